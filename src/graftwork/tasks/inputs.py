"""User inputs for prediction: lines of text, or records that a task's format turns into inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from graftwork.core.example import Example
from graftwork.core.readers import fields_of
from graftwork.core.stored_rows import has_metadata, join_rows, map_rows, store_rows
from graftwork.errors import ConfigError, DataError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import MAPPED
from graftwork.tasks.naming import task_named
from graftwork.tasks.offsets import PARTS
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
_GOLD = (PARTS, "label", "answers", "answer", "explanations", "gold_unmatched", "gold_empty", "labelled")


def read_inputs(path: Path, settings: EvaluationSettings) -> Sequence[Example]:
    """Read inputs for prediction.

    Args:
        path: Own data in any format that training reads, with or without answers; with `settings.prompt`, JSON lines
            with the fields of that task. Any other file is plain text with one input per line.
        settings: `prompt`, `explain`, `lowercase`, `mode` and the mapping of columns are used.

    Raises:
        DataError: If there is no input, or a field that the task's format needs is missing.
    """
    rows = _rows(path, settings)
    if not rows:
        raise DataError(f"{path} has no line of text. Write one input per line.")
    if not settings.lowercase and settings.explain is None:
        return rows
    return store_rows(lambda: _adapted(rows, settings))


def _rows(path: Path, settings: EvaluationSettings) -> Sequence[Example]:
    """Inputs of a file before `lowercase` and `explain`."""
    if settings.prompt is not None:
        task = _prompt_task(settings)
        if path.suffix in (".jsonl", ".json"):
            return store_rows(lambda: _formatted(str(path), read_json_lines(path), task))
        return store_rows(lambda: _formatted_texts(str(path), _filled(path), task))
    if settings.mapped or not is_plain_text(path):
        return _own_rows(path, settings)
    return store_rows(lambda: (Example(key=str(number), input=line, target="") for number, line in _filled(path)))


def _filled(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    return ((number, line) for number, line in enumerate(read_lines(path), 1) if line.strip())


def input_rows(texts: Sequence[str], settings: EvaluationSettings) -> list[Example]:
    """Return texts as inputs for prediction, with ids from 1; the settings are used as by `read_inputs`.

    Raises:
        ConfigError: If the settings map columns, which texts do not have.
        DataError: If the task named by `settings.prompt` needs several fields.
    """
    if settings.mapped:
        given = next(name for name in settings.given if name in MAPPED)
        raise ConfigError(
            f"{given} is {getattr(settings, given)!r}, which has no effect on texts: they have no columns. Leave it "
            "out, or give a file with --input."
        )
    if settings.prompt is None:
        rows = [
            Example(
                key=str(number),
                input=text,
                target="",
                metadata={"turns": (("user", text),), "where": f"text {number}"} if settings.as_chat else {},
            )
            for number, text in enumerate(texts, 1)
        ]
    else:
        rows = list(_formatted_texts("The texts", enumerate(texts, 1), _prompt_task(settings)))
    return list(_adapted(rows, settings))


def _prompt_task(settings: EvaluationSettings) -> Task:
    return task_named(str(settings.prompt), settings.mode)


def _adapted(rows: Iterable[Example], settings: EvaluationSettings) -> Iterator[Example]:
    for row in rows:
        lowered = replace(row, input=row.input.lower()) if settings.lowercase else row
        yield lowered if settings.explain is None else request_explanation(lowered, explain=settings.explain)


def _own_rows(path: Path, settings: EvaluationSettings) -> Sequence[Example]:
    from graftwork.tasks.own_data.explained_task import definition_of, explained_task
    from graftwork.tasks.own_data.task import own_task
    from graftwork.tasks.prepare import is_prepared, load_prepared

    if not (settings.mapped or settings.as_chat) and is_prepared(str(path)):
        return join_rows(examples.rows for examples in load_prepared(path))
    if settings.text_field is not None:
        task, split = explained_task(definition_of(str(path), settings), "all", required=False)
    else:
        task, split = own_task(str(path), "all", settings, required=False)
    return task.load(path.parent, split).rows


def request_explanation(row: Example, *, explain: bool) -> Example:
    """Return the example with the explanation prefix added or removed; source offsets are shifted to match."""
    if row.input.startswith(EXPLAIN) == explain:
        return row
    text = EXPLAIN + row.input if explain else row.input.removeprefix(EXPLAIN)
    metadata: dict[str, Any] = {**row.metadata, "explain": explain}
    if "source_start" in metadata:
        metadata["source_start"] += len(text) - len(row.input)
    if "turns" in metadata:
        # a conversation repeats the input as its question
        turns: Sequence[tuple[str, str]] = metadata["turns"]
        metadata["turns"] = tuple((role, text if told == row.input else told) for role, told in turns)
    return replace(row, input=text, metadata=metadata)


def asked_rows(task: Task, rows: Sequence[Example], explain: bool | None) -> Sequence[Example]:
    """Return the rows of an evaluation, all asked for an explanation or for the label only; None changes none.

    Args:
        task: Task of the rows.
        rows: Its examples.
        explain: Setting of the evaluation.

    Raises:
        ConfigError: If the task has no explanations.
    """
    if explain is None:
        return rows
    if not has_metadata(rows, "explain"):
        raise ConfigError(
            f"explain is {explain}, which has no effect on {task.name}: it has no explanations. Leave it out, or "
            "evaluate on tasks with explanations only."
        )
    return map_rows(rows, partial(request_explanation, explain=explain))


def _formatted_texts(path: str, lines: Iterable[tuple[int, str]], task: Task) -> Iterator[Example]:
    return _formatted(path, ((number, {_only_field(path, task): text}) for number, text in lines), task)


def _formatted(path: str, lines: Iterable[tuple[int, Any]], task: Task) -> Iterator[Example]:
    for number, fields in lines:
        if not isinstance(fields, dict):
            raise DataError(
                f"{path}, line {number}: found {fields!r}; expected an object with the fields of {task.name}."
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
            yield replace(example, target="", answers=(), metadata={**metadata, "spans": ()})


def _only_field(path: str, task: Task) -> str:
    """Name of the single field that plain lines fill."""
    source = getattr(task.format, "source", None)
    if source is None or source == "passage":
        raise DataError(
            f"{path}: found plain text, but {task.name} uses several fields. Expected a file of JSON lines (.jsonl) "
            "with them."
        )
    return source
