"""Upload of a converted model to the hub, with its model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graftwork.core.digests import verify_files
from graftwork.core.files import read_json
from graftwork.core.hub import LOGIN, hub_problem, talking_to_hub
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder
from graftwork.errors import ConfigError
from graftwork.grafting.method import Method
from graftwork.grafting.model_card import CARD_FILE, MARK, model_card

RECORDS = "run"
"""Folder of the repository with the other files of a run."""
_LEFT_OUT = (".lock", ".part", ".new", ".old")
"""Ends of the names of files that are no part of a run."""


def check_upload(repo_id: str, token: str | bool | None) -> None:
    """Refuse an upload that cannot succeed, before anything is written or sent.

    Raises:
        ConfigError: If the id is none of a repository, or there is no token.
    """
    import huggingface_hub

    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except ValueError as error:
        raise ConfigError(f"Cannot push to {repo_id!r}: {hub_problem(error, repo_id)}") from None
    if not token and huggingface_hub.get_token() is None:
        raise ConfigError(f"Cannot push to {repo_id}: found no token of the hub. {LOGIN}.")


def upload_run(
    run: RunFolder,
    methods: Sequence[Method[Any]],
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str | None,
    create_pr: bool,
    whole_run: bool,
) -> str:
    """Upload the model of a run to the hub with its model card.

    Args:
        run: Run folder with the model.
        methods: Methods on the model.
        repo_id: Id of the repository.
        private: Create a private repository; None takes the owner's default.
        token: Token of the hub; None takes that of the login.
        revision: Branch that receives the files; None for the main one.
        commit_message: First line of the commit.
        create_pr: Open a pull request instead of a commit.
        whole_run: Also upload the records of the run.

    Returns:
        Address of the commit or of the pull request.

    Raises:
        ConfigError: If the hub refuses or cannot be reached.
        CheckpointMismatchError: If a file of the model has changed since it was saved.
    """
    import huggingface_hub

    verify_files(run.model, read_json(run.model / MANIFEST_FILE).get("files", {}))
    api: Any = huggingface_hub.HfApi(token=token)
    with talking_to_hub("push to", repo_id):
        name = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        own = run.model / CARD_FILE
        text = own.read_text(encoding="utf-8") if own.exists() else MARK
        card = model_card(run, methods, name=name) if MARK in text else text
        files = [(CARD_FILE, card.encode()), *((path, str(file)) for path, file in _files(run, records=whole_run))]
        done = api.create_commit(
            name,
            [huggingface_hub.CommitOperationAdd(path, content) for path, content in files],
            commit_message=commit_message or "Upload a model converted by Graftwork",
            revision=revision,
            create_pr=create_pr,
        )
    return str(done.pr_url or done.commit_url)


def _files(run: RunFolder, *, records: bool) -> Iterator[tuple[str, Path]]:
    """Paths in the repository and files: the model at the top, and the records of the run in a folder."""
    for file in sorted(run.model.rglob("*")):
        if file.is_file() and file != run.model / CARD_FILE:
            yield file.relative_to(run.model).as_posix(), file
    if not records:
        return
    for file in sorted(run.path.rglob("*")):
        path = file.relative_to(run.path)
        parts = path.parts
        skipped = parts[0] == run.model.name or any(part.startswith((".", "checkpoint-")) for part in parts)
        if file.is_file() and not skipped and not file.name.endswith(_LEFT_OUT):
            yield f"{RECORDS}/{path.as_posix()}", file
