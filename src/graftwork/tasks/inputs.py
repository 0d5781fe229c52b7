"""User inputs for prediction: lines of text, or records that a task's format turns into inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from graftwork.core.example import Example
from graftwork.core.readers import fields_of
from graftwork.errors import DataError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks.own_data.rows import is_plain_text
from graftwork.tasks.sources import Record, read_json_lines, read_lines
from graftwork.tasks.task import Task

EXPLAIN = "explain "
"""Input prefix that requests an explanation."""

_UNKNOWN: Mapping[str, Any] = {
    "label": 0,
    "answer": "",
    "answers": ("",),
    "evidences": (),
    "groups": (),
    "star_rating": 5,
}
"""Placeholders for gold fields that a task's format reads; none of them appears in the input text."""
_GOLD = ("label", "answers", "answer", "explanations", "gold_unmatched", "gold_empty", "labelled")


def read_inputs(path: Path, settings: EvaluationSettings) -> list[Example]:
    """Read inputs for prediction.

    Args:
        path: Own data in any format that training reads, with or without answers; with `settings.prompt`, JSON lines
            with the fields of that task. Any other file is plain text with one input per line.
        settings: `prompt`, `explain`, `lowercase`, `mode` and the mapping of columns are used.

    Raises:
        DataError: If there is no input, or a field that the task's format needs is missing.
    """
    if settings.prompt is not None:
        from graftwork.tasks import get_task

        task = get_task(settings.prompt).in_mode(settings.mode)
        rows = _formatted(path, task, path.suffix in (".jsonl", ".json"))
    elif settings.mapped or not is_plain_text(path):
        rows = _own_rows(path, settings)
    else:
        rows = [
            Example(key=str(n), input=line, target="") for n, line in enumerate(read_lines(path), 1) if line.strip()
        ]
    if not rows:
        raise DataError(f"{path} has no line of text. Write one input per line.")
    if settings.lowercase:
        rows = [replace(row, input=row.input.lower()) for row in rows]
    return rows if settings.explain is None else [request_explanation(row, explain=settings.explain) for row in rows]


def _own_rows(path: Path, settings: EvaluationSettings) -> list[Example]:
    from graftwork.tasks.own_data.task import own_task
    from graftwork.tasks.prepare import is_prepared, load_prepared

    if not (settings.mapped or settings.as_chat) and is_prepared(str(path)):
        return [row for examples in load_prepared(path) for row in examples.rows]
    task, split = own_task(str(path), "all", settings, required=False)
    return list(task.load(path.parent, split).rows)


def request_explanation(row: Example, *, explain: bool) -> Example:
    """Return the example with the explanation prefix added or removed; source offsets are shifted to match."""
    if row.input.startswith(EXPLAIN) == explain:
        return row
    text = EXPLAIN + row.input if explain else row.input.removeprefix(EXPLAIN)
    metadata = {**row.metadata, "explain": explain}
    if "source_start" in metadata:
        metadata["source_start"] += len(text) - len(row.input)
    return replace(row, input=text, metadata=metadata)


def _formatted(path: Path, task: Task, json_lines: bool) -> list[Example]:
    rows: list[Example] = []
    lines: Any = read_json_lines(path) if json_lines else enumerate(read_lines(path), 1)
    for number, value in lines:
        if not json_lines and not value.strip():
            continue
        fields = value if json_lines else {_only_field(path, task): value}
        if not isinstance(fields, dict):
            raise DataError(
                f"{path}, line {number}: found {value!r}; expected an object with the fields of {task.name}."
            )
        record = cast("dict[str, Any]", fields)
        with fields_of(f"{path}, line {number}", f"the fields of {task.name}"):
            try:
                example = task.format(Record(str(record.get("id", number)), {**_UNKNOWN, **record}))
            except KeyError as error:
                raise DataError(
                    f"{path}, line {number}: found no field {error.args[0]!r} but {', '.join(map(repr, record))}; "
                    f"expected it, because {task.name} uses it. Add it, or name another task."
                ) from None
        if example is not None:
            metadata = {key: entry for key, entry in example.metadata.items() if key not in _GOLD}
            rows.append(replace(example, target="", answers=(), metadata={**metadata, "spans": ()}))
    return rows


def _only_field(path: Path, task: Task) -> str:
    """Name of the single field that plain lines fill."""
    source = getattr(task.format, "source", None)
    if source is None or source == "passage":
        raise DataError(
            f"{path}: found plain lines, but {task.name} uses several fields. Expected JSON lines (.jsonl) with them."
        )
    return source
