"""Sources of records: byte-exact file readers, hub data sets, and hashed subsets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast

from graftwork.core.compression import open_bytes
from graftwork.core.files import replace_file
from graftwork.core.readers import read_objects, shorten
from graftwork.core.storage import disk_error
from graftwork.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source, before formatting."""

    key: str
    """Unique name of the row within its split; subsets are drawn by its hash."""
    fields: Mapping[str, Any]
    """Values of the row, by the field names that the source documents."""

    def lowered(self) -> Record:
        """Return a copy with every text in lower case, including texts inside lists and tuples."""
        return Record(self.key, {name: _lower(value) for name, value in self.fields.items()})


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one split."""

    name: str
    """Name of the data set."""
    split: str
    """Split that was read; differs from the requested one after a fallback."""
    rows: Sequence[Record]
    """A tuple, or a stream of a large file."""
    size: int
    """Denominator of scores: kept plus ignored rows, or the size that the data declares."""
    ignored: int
    """Number of malformed rows that were skipped."""
    path: Path
    """Path of the file or folder that was read."""


class Source(Protocol):
    """Reader of one split; `data` is the user's data folder."""

    def __call__(self, data: Path, split: str) -> Records:
        """Return the records of `split`; raise DataError if it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a delimited file, each with its index among the data lines."""

    path: Path
    rows: tuple[tuple[int, Mapping[str, str]], ...]
    """Pairs of index (from 0, ignored lines included) and cells by column name."""
    lines: int
    """Number of data lines, including ignored ones and excluding the header."""

    @property
    def ignored(self) -> int:
        """Number of lines whose cell count differs from the number of columns."""
        return self.lines - len(self.rows)


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a file; only a line feed ends a line.

    Text mode and `str.splitlines` also split at a lone carriage return or U+2028, which occur inside passages; every
    later row would then be misaligned with its file of answers. The carriage return of a CRLF and a byte-order mark
    are dropped. Compressed files are decompressed (gzip, bzip2, xz, Zstandard).

    Raises:
        DataError: If the file cannot be opened or decompressed, or a line is not UTF-8.
    """
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            yield _decode(path, number, line)


def read_json_lines(path: Path, *, skip_blank: bool = True) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each line of a JSON-lines file.

    Args:
        path: The file.
        skip_blank: Skip empty lines; set to False if line numbers pair the file with another one.

    Raises:
        DataError: If a line is not valid JSON; the message names file and line.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if skip_blank and not line.strip():
            continue
        yield from read_objects(path, iter(((number, line),)))


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Read a tab-separated file; quote characters are literal.

    Source: `allenai/unifiedqa` also reads its files with quoting disabled.

    Args:
        path: The file.
        columns: Column names of a file without header; None reads them from the first line.

    Returns:
        The lines with exactly one cell per column; other lines are only counted.

    Raises:
        DataError: If the file cannot be read or its header is invalid.
    """
    lines = read_lines(path)
    names = _header(path, next(lines, "").split("\t")) if columns is None else tuple(columns)
    return _table(path, names, (line.split("\t") for line in lines))


def read_csv(path: Path, columns: Iterable[str] = ()) -> Table:
    """Read a comma-separated file with a header; quoted cells may contain commas, quotes and line breaks.

    Args:
        path: The file.
        columns: Required columns; other columns are kept too.

    Raises:
        DataError: If a required column is missing or a quote is not closed; the message names file and line.
    """
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    no_header: list[str] = []
    try:
        names = _header(path, next(reader, no_header))
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
            "quotes are paired. Fix the line."
        ) from error


@dataclass(frozen=True, slots=True)
class HubSource:
    """Source of a Hugging Face hub data set, or anything else that `datasets.load_dataset` opens; needs no folder.

    Raises:
        DataError: If the data set or its split cannot be loaded.
    """

    path: str
    name: str | None = None
    """Configuration of the data set."""
    splits: Mapping[str, str] = field(default_factory=dict[str, str])
    """Split name on the hub by our split name, where they differ, such as {"dev": "validation"}."""
    key: str | None = None
    """Column with a unique name of each row; None uses the row index."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of `load_dataset`: revision, streaming, data_files."""

    def __call__(self, data: Path, split: str) -> Records:
        """Download or open the split and read all of its rows."""
        import datasets  # pyright: ignore[reportMissingTypeStubs]

        hub_split = self.splits.get(split, split)
        load = cast("Callable[..., object]", datasets.load_dataset)  # pyright: ignore[reportUnknownMemberType]
        try:
            dataset = cast("Iterable[Mapping[str, Any]]", load(self.path, self.name, split=hub_split, **self.options))
            rows = tuple(
                Record(str(row[self.key] if self.key else index), row) for index, row in enumerate(map(dict, dataset))
            )
        except Exception as error:
            # datasets raises errors of Arrow, of the hub client and of its own beside those of Python
            raise disk_error(error) or DataError(
                f"{self.path}: found no split {hub_split!r} to load ({' '.join(str(error).split())}); expected a data "
                "set that the hub or this machine's cache holds. Check name, split and network."
            ) from error
        return Records(self.name or self.path, split, rows, len(rows), 0, Path(self.path))


def written(text: str) -> str:
    """Return an explanation, or the empty text for what programs write in place of none: white space, or `nan`."""
    return "" if text.strip().lower() in ("", "nan", "none", "null") else text


def subset_order(keys: Sequence[str], *, split: str, seed: int = 0) -> list[int]:
    """Return the indices of `keys` in a pseudo-random order that depends only on key, split and seed.

    A row's sort key is the 8-byte BLAKE2b digest of "seed:split:key". Any prefix is a random sample, independent of the
    order of the file; prefixes are nested, so one task can take the rows that another one skips.

    Args:
        keys: Unique names of the rows; equal keys keep their order.
        split: Salt of the hash, so that splits with equal keys are ordered independently.
        seed: Seed of the order.
    """
    digests = [blake2b(f"{seed}:{split}:{key}".encode(), digest_size=8).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    with replace_file(path) as file:
        # escape non-ASCII characters: other readers split lines at U+2028
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _lower(value: Any) -> Any:
    if isinstance(value, str):
        return value.lower()
    if type(value) is list:
        return list(map(_lower, cast("list[Any]", value)))
    return tuple(map(_lower, cast("tuple[Any, ...]", value))) if type(value) is tuple else value


def _decode(path: Path, number: int, line: bytes) -> str:
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    line = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
    if b"\0" in line:
        raise DataError(
            f"{path}, line {number}: found a NUL character at position {line.index(0)}; expected UTF-8 text. Convert "
            "the file, for example with `iconv -f utf-16 -t utf-8`."
        )
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: found byte 0x{line[error.start]:02x} at position {error.start}; expected UTF-8. "
            "Convert the file, for example with `iconv -t utf-8`."
        ) from error


def _header(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    if not any(cells) or len(set(cells)) != len(cells):
        raise DataError(f"{path}, line 1: found {shorten(list(cells))}; expected a header of distinct names.")
    return tuple(cells)


def _table(path: Path, names: tuple[str, ...], lines: Iterable[list[str]]) -> Table:
    rows: list[tuple[int, Mapping[str, str]]] = []
    count = 0
    for index, cells in enumerate(lines):
        count = index + 1
        if len(cells) == len(names):
            rows.append((index, dict(zip(names, cells, strict=True))))
    return Table(path, tuple(rows), count)


def is_answer_list(value: Any, *, empty: bool = False) -> TypeGuard[list[str]]:
    """True if a JSON value is a list of texts; an empty list counts only if `empty` is set."""
    if not isinstance(value, list):
        return False
    answers = cast("list[Any]", value)
    return (bool(answers) or empty) and all(isinstance(answer, str) for answer in answers)
