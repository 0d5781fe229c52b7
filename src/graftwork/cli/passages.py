"""The verbs that care for passages: their index and the bank of their gradients."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli.output import show

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def index(
    corpus: Annotated[
        str | None, typer.Argument(help="A .tsv or .jsonl file, a folder of them, or a pattern in quotes.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder, or the name of an index in Elasticsearch.")
    ] = "",
    backend: Annotated[str, typer.Option(help="embedded or elasticsearch.")] = "embedded",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished index once the new one is.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="Add the corpus to a finished embedded index.")] = False,
    delete: Annotated[list[str] | None, typer.Option(help="Id of a passage to take out. Repeat for several.")] = None,
    query: Annotated[list[str] | None, typer.Option(help="Search the index for this. Repeat for several.")] = None,
    top_k: Annotated[int, typer.Option(help="Passages found for each query.", min=1)] = 3,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Search an index that was not finished.")
    ] = False,
    json: Json = False,
) -> None:
    """Index passages for retrieval; run again after a stop, it goes on where it was."""
    from graftwork.cli import retrieval

    show(
        retrieval.index_passages(
            corpus, output, backend, overwrite=overwrite, add=add, delete=delete or [], queries=query or [], k=top_k,
            allow_incomplete=allow_incomplete,
        ),
        as_json=json,
    )  # fmt: skip
