"""Commands that prepare data: text-to-text files, questions with passages, the index of passages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwork.core.config import to_plain
from graftwork.core.messages import say, show
from graftwork.grafting.commands import Json


def index(
    corpus: Annotated[
        str | None, typer.Argument(help="A .tsv or .jsonl file, a folder of them, or a pattern in quotes.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder, or the name of an index in a search server.")
    ] = "",
    backend: Annotated[str, typer.Option(help="embedded, opensearch or elasticsearch.")] = "embedded",
    retriever: Annotated[
        str | None,
        typer.Option(help="Ranking by words (bm25), vectors (dense) or both (hybrid); by default what was built."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Folder or hub id of the encoder, to build vectors for dense or hybrid.")
    ] = None,
    split_tokens: Annotated[
        int | None, typer.Option(help="Split documents into passages of at most this many tokens, such as 200.", min=2)
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Tokens that each passage repeats of the one before; 40 by default.", min=0)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model whose tokens --split-tokens counts.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished index when the new one is finished.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="Add the corpus to a finished embedded index.")] = False,
    delete: Annotated[list[str] | None, typer.Option(help="Id of a passage to delete. Repeat for several.")] = None,
    query: Annotated[list[str] | None, typer.Option(help="Search the index for this. Repeat for several.")] = None,
    top_k: Annotated[int, typer.Option(help="Passages found for each query.", min=1)] = 3,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Search an index whose build was interrupted.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all files of an embedded index and compare them with its digests.")
    ] = False,
    json: Json = False,
) -> None:
    """Index passages for retrieval; resumes after a stop."""
    from graftwork.retrieval.maintenance import index_passages

    show(
        index_passages(
            corpus,
            output,
            backend,
            overwrite=overwrite,
            add=add,
            delete=delete or [],
            queries=query or [],
            k=top_k,
            allow_incomplete=allow_incomplete,
            verify=verify,
            retriever=retriever,
            encoder=encoder,
            split_tokens=split_tokens,
            overlap=overlap,
            tokenizer=tokenizer,
        ),
        as_json=json,
    )


def prepare(
    tasks: Annotated[
        list[str], typer.Argument(help="unifiedqa/NAME, all for every folder of these, or multihop/NAME.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write to.")],
    input: Annotated[
        str | None, typer.Option("--input", "-i", help="Folder of the raw data sets; not needed with --merge.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to read; dev falls back to test files.")] = "dev",
    format: Annotated[
        str, typer.Option(help="unifiedqa (input as it is) or t5 (question and context marked).")
    ] = "unifiedqa",
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; counts the tokens of each input.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that count tokens.")] = None,
    lowercase: Annotated[bool, typer.Option(help="Lower-case texts, as in the training of UnifiedQA.")] = False,
    weighted_to: Annotated[
        int | None, typer.Option(help="Also write a mixture of about this many rows a data set.")
    ] = None,
    index: Annotated[str | None, typer.Option(help="Find passages in this index for multihop questions.")] = None,
    backend: Annotated[
        str, typer.Option(help="Engine of that index: embedded, opensearch or elasticsearch.")
    ] = "embedded",
    top_k: Annotated[int, typer.Option(help="Passages for each question.", min=1)] = 3,
    start: Annotated[int | None, typer.Option(help="First question of a slice.", min=0)] = None,
    end: Annotated[int | None, typer.Option(help="Question to stop a slice before.", min=1)] = None,
    merge: Annotated[list[str] | None, typer.Option(help="Merge augmented slices instead. Repeat.")] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Augmented file that must share no question with the output.")
    ] = None,
    json: Json = False,
) -> None:
    """Convert raw files to text-to-text JSON lines, or retrieve passages for multihop questions."""
    multihop = any(name.startswith("multihop/") for name in tasks)
    if merge and not multihop:
        raise typer.BadParameter("Found no multihop task; expected the one of the slices.", param_hint="--merge")
    if input is None and not merge:
        raise typer.BadParameter("Found none; expected the folder of the raw data sets.", param_hint="--input")
    if multihop:
        from graftwork.tasks.multihop_preparation import augment_questions

        show(
            augment_questions(
                tasks,
                input=input or "",
                output=output,
                split=split,
                index=index,
                backend=backend,
                top_k=top_k,
                start=start,
                end=end,
                merge=merge or [],
                held_out=held_out or [],
            ),
            as_json=json,
        )
        return
    show(
        prepare_files(
            tasks,
            input=input or "",
            output=output,
            split=split,
            format=format,
            tokenizer=tokenizer,
            workers=workers,
            lowercase=lowercase,
            weighted_to=weighted_to,
        ),
        as_json=json,
    )


def prepare_files(
    tasks: Sequence[str], *, input: str, output: str, split: str, format: Any, **options: Any
) -> list[dict[str, Any]]:
    """Convert raw files of UnifiedQA data sets to text-to-text JSON lines.

    Args:
        tasks: Names of data sets, or "all".
        input: Folder of the raw data sets.
        output: Folder to write to.
        split: Split to read.
        format: `unifiedqa` or `t5`.
        options: Further arguments of `graftwork.tasks.prepare.prepare`.

    Returns:
        One summary for each data set.
    """
    from graftwork.tasks.prepare import prepare

    names = [name.removeprefix("unifiedqa/").removesuffix("_t5") for name in tasks]
    prepared = prepare(names, input=Path(input), output=Path(output), split=split, format=format, **options)
    say(f"Wrote {prepared.path}" + (f" and {prepared.weighted_path}" if prepared.weighted_path else ""))
    return [to_plain(summary) for summary in prepared.summaries]
