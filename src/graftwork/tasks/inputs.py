"""Inputs of one's own: lines of text, or records that a task words as it words its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks.sources import Record, read_json_lines, read_lines
from graftwork.tasks.task import Task

EXPLAIN = "explain "
"""What stands before an input that asks for a reason."""

_UNKNOWN: Mapping[str, Any] = {
    "label": 0,
    "answer": "",
    "answers": ("",),
    "evidences": (),
    "groups": (),
    "star_rating": 5,
}
"""Stands in for what a task's format reads beside the inputs; none of it reaches the text."""
_GOLD = ("label", "answers", "answer", "explanations", "gold_unmatched", "gold_empty", "labelled")


def read_inputs(path: Path, settings: EvaluationSettings) -> list[Example]:
    """Read the inputs to answer.

    Args:
        path: JSON lines with an `input`, or with the fields of the task that `settings.prompt` names; or any text, one
            input a line.
        settings: `prompt`, `explain`, `lowercase` and `mode` are used.

    Raises:
        DataError: If there is no input, or a field that the task words is missing.
    """
    json_lines = path.suffix in (".jsonl", ".json")
    if settings.prompt is not None:
        from graftwork.tasks import get_task

        task = get_task(settings.prompt).in_mode(settings.mode)
        rows = _worded(path, task, json_lines)
    elif json_lines:
        from graftwork.tasks.prepare import load_prepared

        rows = [row for examples in load_prepared(path) for row in examples.rows]
    else:
        rows = [
            Example(key=str(n), input=line, target="") for n, line in enumerate(read_lines(path), 1) if line.strip()
        ]
    if not rows:
        raise DataError(f"{path} holds no line of text. Write one input on each line.")
    if settings.lowercase:
        rows = [replace(row, input=row.input.lower()) for row in rows]
    return rows if settings.explain is None else [asked(row, explain=settings.explain) for row in rows]


def asked(row: Example, *, explain: bool) -> Example:
    """The same input with a reason asked for, or without."""
    if row.input.startswith(EXPLAIN) == explain:
        return row
    text = EXPLAIN + row.input if explain else row.input.removeprefix(EXPLAIN)
    metadata = {**row.metadata, "explain": explain}
    if "source_start" in metadata:
        metadata["source_start"] += len(text) - len(row.input)
    return replace(row, input=text, metadata=metadata)


def _worded(path: Path, task: Task, json_lines: bool) -> list[Example]:
    rows = []
    lines: Any = read_json_lines(path) if json_lines else enumerate(read_lines(path), 1)
    for number, value in lines:
        if not json_lines and not value.strip():
            continue
        fields = value if json_lines else {_only_field(path, task): value}
        if not isinstance(fields, dict):
            raise DataError(
                f"{path}, line {number}: found {value!r}; expected an object with the fields of {task.name}."
            )
        try:
            example = task.format(Record(str(fields.get("id", number)), {**_UNKNOWN, **fields}))
        except KeyError as error:
            raise DataError(
                f"{path}, line {number}: found no field {error.args[0]!r} but {', '.join(map(repr, fields))}; expected "
                f"it, because {task.name} words it. Add it, or name another task."
            ) from None
        if example is not None:
            metadata = {key: entry for key, entry in example.metadata.items() if key not in _GOLD}
            rows.append(replace(example, target="", answers=(), metadata={**metadata, "spans": ()}))
    return rows


def _only_field(path: Path, task: Task) -> str:
    """The field that a plain line stands for."""
    source = getattr(task.format, "source", None)
    if source is None or source == "passage":
        raise DataError(
            f"{path}: found plain lines, but {task.name} words several fields. Expected JSON lines (.jsonl) with them."
        )
    return source
