"""Prepared files: JSON lines with a text field `input`, as `graftwork prepare` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from graftwork.core.cache import remembered
from graftwork.core.readers import shorten
from graftwork.errors import DataError
from graftwork.tasks.sources import Record, Records, is_answer_list, read_json_lines
from graftwork.tasks.streams import RecordStream, is_large, source_key


def read_prepared(path: Path) -> list[Records]:
    """Read JSON lines of formatted inputs and answers, one group per data set and split.

    Only a text field `input` is required on each line; `prepare` writes all fields.

    Returns:
        Records with the fields `input`, `ans`, `all_answers` and `formatted`, and all other fields of the lines. A line
        without an answer, for prediction, has an empty `ans` and no `all_answers`.

    Raises:
        DataError: If a line lacks a field or a field has the wrong type; the message names file and line.
    """
    if is_large(path):
        key = source_key(path, "prepared")
        return [
            Records(
                name,
                split,
                RecordStream(partial(_group, path, name, split), count, f"{key} {name} {split}"),
                size,
                0,
                path,
            )
            for name, split, count, size in remembered(key, lambda: _groups(path))
        ]
    groups: dict[tuple[str, str], list[Record]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for name, split, record, size in _read(path):
        groups.setdefault((name, split), []).append(record)
        sizes[name, split] = size
    return [
        Records(name, split, tuple(rows), max(sizes[name, split], len(rows)), 0, path)
        for (name, split), rows in groups.items()
    ]


def _groups(path: Path) -> list[tuple[str, str, int, int]]:
    """Validate a file; return name, split, number of rows and size of each data set in it."""
    counts: dict[tuple[str, str], int] = {}
    sizes: dict[tuple[str, str], int] = {}
    for name, split, _, size in _read(path):
        counts[name, split] = counts.get((name, split), 0) + 1
        sizes[name, split] = size
    return [(name, split, count, max(sizes[name, split], count)) for (name, split), count in counts.items()]


def _group(path: Path, name: str, split: str) -> Iterator[Record]:
    return (record for found, part, record, _ in _read(path) if (found, part) == (name, split))


def _read(path: Path) -> Iterator[tuple[str, str, Record, int]]:
    """Yield data set, split, record and declared size of every line."""
    counts: dict[tuple[str, str], int] = {}
    sizes: dict[tuple[str, str], int] = {}
    for number, value in read_json_lines(path):
        fields = _prepared_fields(path, number, value)
        group = (str(fields.get("dataset", path.stem)), str(fields.get("split", "all")))
        position = counts.setdefault(group, 0)
        counts[group] += 1
        size = int(fields.get("split_size", 0))
        if size != sizes.setdefault(group, size):
            raise DataError(
                f"{path}, line {number}: found split_size {size} after {sizes[group]} for {group[0]}; expected one "
                "size for each data set. Prepare the file again from one source."
            )
        yield *group, Record(str(fields.get("id", position)), fields), size


def _prepared_fields(path: Path, number: int, value: Any) -> dict[str, Any]:
    """Validate one line of a prepared file; the answer, named `ans` or `target`, is stored in `ans`."""

    def fail(found: str, expected: str) -> DataError:
        return DataError(f"{path}, line {number}: found {found}; expected {expected}. Fix or remove the line.")

    if not isinstance(value, dict):
        raise fail(f"a {type(value).__name__}", 'an object such as {"input": "…", "target": "…"}')
    row = cast("dict[str, Any]", value)
    if "input" not in row:
        raise fail(f"no field 'input' but {', '.join(map(repr, row)) or 'an empty object'}", "a text field 'input'")
    answer = row.get("ans", row.get("target"))
    texts: dict[str, Any] = {"input": row["input"], "ans": "" if answer is None else answer}
    texts |= {name: row[name] for name in ("dataset", "split") if name in row}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise fail(f"{shorten(text)} as '{name}'", "a text")
    answers: Any = row.get("all_answers", [] if answer is None else [answer])
    if not is_answer_list(answers, empty=answer is None):
        raise fail(f"{shorten(answers)} as 'all_answers'", "a list of at least one text")
    size: Any = row.get("split_size", 0)
    if type(size) is not int or size < 0:
        raise fail(f"{shorten(size)} as 'split_size'", "a number of rows")
    return {**row, **texts, "all_answers": tuple(answers), "formatted": True}
