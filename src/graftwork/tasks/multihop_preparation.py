"""Preparation of multihop questions: passages found for each, or the questions alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
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
    """Write `<output>/<set>/<split>.json` for every task; a slice of it under a name of its own."""
    from graftwork.tasks.augmentation import Augmented, augment, check_leakage, merge_augmented
    from graftwork.tasks.multihop import DATASETS

    names = [name.removeprefix("multihop/") for name in tasks]
    if unknown := [name for name in names if name not in DATASETS]:
        raise UnknownNameError("multihop task", unknown[0], DATASETS)
    if merge and (len(names) != 1 or index is not None):
        raise ConfigError("--merge puts the slices of one task together. Name one task, and leave --index out.")
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
    """Questions alone, in the text-to-text form that every task reader reads."""
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
    say(f"Wrote {path}")
    return {"path": str(path), "questions": len(examples.rows), "passages": 0}
