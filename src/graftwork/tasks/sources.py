"""Where records come from: files read exactly as they are, hub data sets, and the subsets drawn from either."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from graftwork.core.files import replace_file
from graftwork.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source, before any method's wording is put around it."""

    key: str
    """What names the row within its split; subsets are drawn by its hash."""
    fields: Mapping[str, Any]
    """The row's values, under the names that the source documents."""

    def lowered(self) -> Record:
        """The same record with every text in lower case, also those inside lists and tuples."""
        return Record(self.key, {name: _lower(value) for name, value in self.fields.items()})


@dataclass(frozen=True, slots=True)
class Records:
    """What a source found for one split."""

    name: str
    """Name of the data set, as the source knows it."""
    split: str
    """The split really read, which a fallback can make another one than was asked for."""
    rows: tuple[Record, ...]
    size: int
    """Rows that a score is divided by: those kept and those ignored, or what the data says of itself."""
    ignored: int
    """Rows left out because they are not in the source's format."""
    path: Path
    """Where the rows were read from."""


class Source(Protocol):
    """Reads one split; `data` is the folder that the user named."""

    def __call__(self, data: Path, split: str) -> Records:
        """The records of `split`; a DataError if there are none to be had."""
        ...


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a delimited file, each with its place among the file's data lines."""

    path: Path
    rows: tuple[tuple[int, Mapping[str, str]], ...]
    """(index from 0, counting ignored lines; cells by column name)."""
    lines: int
    """Data lines of the file, ignored ones included, a header not."""

    @property
    def ignored(self) -> int:
        """Lines that do not have exactly the table's columns."""
        return self.lines - len(self.rows)


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a file, where only a line feed ends a line.

    Text mode and `str.splitlines` also break at a lone carriage return or U+2028, which do occur inside passages and
    would shift every later row against its file of answers. The carriage return of a CRLF is dropped, and so is a
    byte-order mark.

    Raises:
        DataError: If the file cannot be opened or a line is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decode(path, number, line)
    except OSError as error:
        raise DataError(
            f"{path}: found {error.strerror or error}; expected a readable file. Check the path."
        ) from error


def read_json_lines(path: Path, *, skip_blank: bool = True) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each line of a JSON-lines file.

    Args:
        path: The file.
        skip_blank: Pass over empty lines; off where line numbers pair the file with another one.

    Raises:
        DataError: If a line is not JSON; the message names file and line.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if skip_blank and not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: found {_shorten(line)}, not JSON ({error.msg}, column {error.colno}); "
                "expected one JSON value on each line. Mend or remove the line."
            ) from error
        yield number, value


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Read a tab-separated file in which quotes mean nothing.

    Source: `allenai/unifiedqa` reads its files with quoting disabled as well.

    Args:
        path: The file.
        columns: Names of the columns of a file without header; None takes them from the first line.

    Returns:
        The lines with exactly that many cells; the others are counted.

    Raises:
        DataError: If the file cannot be read or its header is not usable.
    """
    lines = read_lines(path)
    names = _header(path, next(lines, "").split("\t")) if columns is None else tuple(columns)
    return _table(path, names, (line.split("\t") for line in lines))


def read_csv(path: Path, columns: Iterable[str] = ()) -> Table:
    """Read a comma-separated file with a header, whose quoted cells may hold commas, quotes and line breaks.

    Args:
        path: The file.
        columns: Columns that must be there; others are kept too.

    Raises:
        DataError: If a column is missing or a quote is never closed; the message names file and line.
    """
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    try:
        names = _header(path, next(reader, []))
        missing = [column for column in columns if column not in names]
        if missing:
            raise DataError(
                f"{path}, line 1: found the columns {', '.join(names)}; expected also {', '.join(missing)}. "
                "Check that this is the original file."
            )
        return _table(path, names, reader)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: found broken quoting ({error}); expected comma-separated values in which "
            "quotes are paired. Mend the line."
        ) from error


def read_prepared(path: Path) -> list[Records]:
    """Read JSON lines of finished inputs and answers, one group for each data set and split in them.

    Every file with a text called `input` on each line will do; `prepare` writes all of the fields.

    Returns:
        Records with the fields `input`, `ans`, `all_answers` and `formatted`, and whatever else the lines hold. A line
        without an answer, as for prediction, has an empty `ans` and no `all_answers`.

    Raises:
        DataError: If a line lacks a field or holds one of a wrong kind; the message names file and line.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for number, value in read_json_lines(path):
        fields = _prepared_fields(path, number, value)
        group = (fields.get("dataset", path.stem), fields.get("split", "all"))
        rows = groups.setdefault(group, [])
        rows.append(Record(str(fields.get("id", len(rows))), fields))
        size = fields.get("split_size", 0)
        if size != sizes.setdefault(group, size):
            raise DataError(
                f"{path}, line {number}: found split_size {size} after {sizes[group]} for {group[0]}; expected one "
                "size for each data set. Prepare the file again from one source."
            )
    return [
        Records(name, split, tuple(rows), max(sizes[name, split], len(rows)), 0, path)
        for (name, split), rows in groups.items()
    ]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set of the Hugging Face hub, or anything else that `datasets.load_dataset` opens; needs no data folder.

    Raises:
        DataError: If the data set or its split cannot be had.
    """

    path: str
    name: str | None = None
    """Configuration of the data set."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """The hub's word for a split where it differs from ours, such as {"dev": "validation"}."""
    key: str | None = None
    """Column that names a row; None takes the row's number."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `load_dataset`: revision, streaming, data_files."""

    def __call__(self, data: Path, split: str) -> Records:
        """Download or open the split and read all of its rows."""
        from datasets import load_dataset

        hub_split = self.splits.get(split, split)
        try:
            dataset = load_dataset(self.path, self.name, split=hub_split, **self.options)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: found no split {hub_split!r} to load ({error}); expected a data set that the hub or "
                "this machine's cache holds. Check name, split and network."
            ) from error
        rows = tuple(
            Record(str(row[self.key] if self.key else index), row) for index, row in enumerate(map(dict, dataset))
        )
        return Records(self.name or self.path, split, rows, len(rows), 0, Path(self.path))


def subset_order(keys: Sequence[str], *, split: str, seed: int = 0) -> list[int]:
    """Indices of `keys` in a fixed pseudo-random order that depends on nothing but key, split and seed.

    The first n of it are a fair sample whatever order the file has, the first 100 lie inside the first 200, and what
    one task takes, another can skip.

    Args:
        keys: Names of the rows; equal keys keep their order.
        split: Salts the hash, so that splits with equal keys are drawn independently.
        seed: Draws another order.
    """
    digests = [blake2b(f"{seed}:{split}:{key}".encode(), digest_size=8).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with replace_file(path) as file:
        # ASCII escapes keep U+2028 out of the file, at which other readers break a line
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _lower(value: Any) -> Any:
    if isinstance(value, str):
        return value.lower()
    return type(value)(map(_lower, value)) if type(value) in (list, tuple) else value


def _decode(path: Path, number: int, line: bytes) -> str:
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    line = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: found byte 0x{line[error.start]:02x} at position {error.start}; expected UTF-8. "
            "Convert the file, for example with `iconv -t utf-8`."
        ) from error


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _header(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    if not any(cells) or len(set(cells)) != len(cells):
        raise DataError(f"{path}, line 1: found {_shorten(str(list(cells)))}; expected a header of different names.")
    return tuple(cells)


def _table(path: Path, names: tuple[str, ...], lines: Iterable[list[str]]) -> Table:
    rows, count = [], 0
    for index, cells in enumerate(lines):
        count = index + 1
        if len(cells) == len(names):
            rows.append((index, dict(zip(names, cells, strict=True))))
    return Table(path, tuple(rows), count)


def _prepared_fields(path: Path, number: int, value: Any) -> dict[str, Any]:
    """One line of a prepared file, checked, with an answer of either name under `ans`."""

    def fail(found: str, expected: str) -> DataError:
        return DataError(f"{path}, line {number}: found {found}; expected {expected}. Mend or remove the line.")

    if not isinstance(value, dict):
        raise fail(f"a {type(value).__name__}", 'an object such as {"input": "…", "target": "…"}')
    if "input" not in value:
        raise fail(f"no field 'input' but {', '.join(map(repr, value)) or 'an empty object'}", "a text called 'input'")
    answer = value.get("ans", value.get("target"))
    texts = {"input": value["input"], "ans": "" if answer is None else answer}
    texts |= {name: value[name] for name in ("dataset", "split") if name in value}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise fail(f"{_shorten(str(text))} as '{name}'", "a text")
    answers = value.get("all_answers", [] if answer is None else [answer])
    if not is_answer_list(answers, empty=answer is None):
        raise fail(f"{_shorten(str(answers))} as 'all_answers'", "a list of at least one text")
    size = value.get("split_size", 0)
    if type(size) is not int or size < 0:
        raise fail(f"{_shorten(str(size))} as 'split_size'", "a number of rows")
    return {**value, **texts, "all_answers": tuple(answers), "formatted": True}


def is_answer_list(value: Any, *, empty: bool = False) -> bool:
    """Whether a value read from JSON is a list of texts, and not an empty one unless that is allowed."""
    return isinstance(value, list) and (bool(value) or empty) and all(isinstance(answer, str) for answer in value)
