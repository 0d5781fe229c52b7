"""Preparation of multihop questions: files of questions with retrieved passages, or without passages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.files import write_checksum
from graftwork.core.messages import say
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, UnknownNameError
from graftwork.retrieval import open_index


def augment_questions(
    tasks: Sequence[str],
    *,
    input: str,
    output: str,
    split: str,
    index: str | None,
    backend: str,
    top_k: int,
    start: int | None,
    end: int | None,
    merge: Sequence[str],
    held_out: Sequence[str],
) -> list[dict[str, Any]]:
    """Write `<output>/<data set>/<split>.json` for every task; a slice gets the file name `<split>.<start>-<end>.json`.

    Args:
        tasks: Multihop tasks, with or without the prefix "multihop/".
        input: Folder of the raw files.
        output: Folder to write to.
        split: Split to read.
        index: Folder or address of the index to search; None writes the questions without passages.
        backend: Name of the retriever.
        top_k: Passages per question.
        start: Index of the first question; choose it with `end` to share the work among processes.
        end: Index after the last question.
        merge: Slices to merge instead of searching.
        held_out: Evaluation files that must not share questions with the written files.

    Returns:
        Paths and counts of the written files.

    Raises:
        UnknownNameError: If a task is not a multihop task.
        ConfigError: If `merge` is combined with an index or with several tasks.
        DataError: If a held-out file shares questions with a written file.
    """
    from graftwork.tasks.augmentation import Augmented, augment, check_leakage, merge_augmented
    from graftwork.tasks.multihop import DATASETS

    names = [name.removeprefix("multihop/") for name in tasks]
    if unknown := [name for name in names if name not in DATASETS]:
        raise UnknownNameError("multihop task", unknown[0], DATASETS)
    if merge and (len(names) != 1 or index is not None):
        raise ConfigError("--merge merges the slices of one task. Name one task, and omit --index.")
    if not merge and index is None:
        return [_questions(name, input, output, split) for name in names]
    written: list[Augmented] = []
    for name in names:
        cut = "" if merge or (start is None and end is None) else f".{start or 0}-{'end' if end is None else end}"
        path = Path(output) / name / f"{split}{cut}.json"
        if merge:
            written.append(merge_augmented([Path(file) for file in merge], path))
        else:
            retriever = open_index(str(index), backend)
            with Progress(f"passages for {name}", total=0) as progress:
                written.append(
                    augment(
                        DATASETS[name],
                        Path(input),
                        path,
                        retriever,
                        split=split,
                        top_k=top_k,
                        start=start,
                        end=end,
                        engine=backend,
                        progress=progress.advance,
                    )
                )
        check_leakage(path, [Path(file) for file in held_out])
    say(f"Wrote {', '.join(str(done.path) for done in written)}")
    return [to_plain(done) for done in written]


def _questions(name: str, input: str, output: str, split: str) -> dict[str, Any]:
    """Write the questions without passages, in the text-to-text format of prepared files."""
    from graftwork.tasks import get_task
    from graftwork.tasks.sources import write_json_lines

    examples = get_task(f"multihop/{name}").load(Path(input), split)
    path = Path(output) / f"{name}_{split}.jsonl"
    write_json_lines(
        path,
        (
            {
                "dataset": name,
                "split": split,
                "id": row.key,
                "input": row.input,
                "ans": row.target,
                "all_answers": list(row.answers),
                "split_size": examples.size,
            }
            for row in examples.rows
        ),
    )
    write_checksum(path)
    say(f"Wrote {path}")
    return {"path": str(path), "questions": len(examples.rows), "passages": 0}
