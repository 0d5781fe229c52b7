"""`graftwork push`: upload a run to the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.core.messages import say, show
from graftwork.grafting.commands import Json


def push(
    model: Annotated[str, typer.Argument(help="Run folder or model folder.")],
    repository: Annotated[str, typer.Argument(help="Repository on the hub, OWNER/NAME; created if it does not exist.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; the owner's default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    whole_run: Annotated[
        bool,
        typer.Option(
            "--whole-run",
            help="Also upload the records of the run: settings, results, predictions, reports, artifacts.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Upload a model to the hub with a model card; `hf auth login` or HF_TOKEN sets the token."""
    from graftwork.grafting.hub import check_upload
    from graftwork.pipeline.loading import load

    # before the model is loaded
    check_upload(repository, None)
    address = load(model).push_to_hub(
        repository,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        whole_run=whole_run,
    )
    say(f"Pushed {model} to {repository}")
    show({"commit": address} if json else address, as_json=json)
