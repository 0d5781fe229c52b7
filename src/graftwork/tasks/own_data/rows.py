"""Rows of data files in any common format: JSON lines, JSON, CSV, TSV, Parquet, each of them compressed or not.

The format is recognised from the content. Rows are generated one by one, each with its place for error messages.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftwork.core.compression import MAGIC, open_bytes, without_compression_suffix
from graftwork.core.readers import JsonError, parse_json, read_head, reading, shorten
from graftwork.errors import DataError
from graftwork.tasks.own_data.values import as_object, listed
from graftwork.tasks.sources import read_lines, read_objects
from graftwork.tasks.wikitext import TEXT_SUFFIXES

Row = tuple[str, Mapping[str, Any]]
"""Place of a row ("data.csv, line 3") and its fields."""

FOREIGN: Mapping[bytes, str] = {
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"ARROW1": "an Arrow file; write it as Parquet or JSON lines",
    b"SQLite format 3": "a SQLite database; export it as CSV",
    b"\xff\xfe": "UTF-16; convert it, for example with `iconv -f utf-16 -t utf-8`",
    b"\xfe\xff": "UTF-16; convert it, for example with `iconv -f utf-16 -t utf-8`",
    b"%PDF": "a PDF document; extract its text",
}
"""First bytes of files that are recognised, but not read."""
PARQUET = b"PAR1"
DELIMITED = (".csv", ".tsv")
SUFFIXES = (*DELIMITED, ".jsonl", ".json", ".ndjson", ".parquet")
"""File suffixes of rows, before the suffix of a compression; the content decides between them."""
_BATCH = 1000


@dataclass(frozen=True)
class RowFile:
    """A data file with its recognised format; `rows` reads it anew."""

    path: Path
    kind: str
    """Name of the format, for messages: "JSON lines", "CSV", "Parquet", "SQuAD JSON", …"""
    columns: tuple[str, ...] = ()
    """Column names of a table; empty for JSON, whose rows may differ."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the file.

        Raises:
            DataError: If the file is damaged or a row is malformed; the message names file and line or row.
        """
        readers = {
            "JSON lines": _json_lines,
            "JSON array": _json_items,
            "SQuAD JSON": _squad_rows,
            "Parquet": _parquet_rows,
        }
        yield from readers[self.kind](self.path) if self.kind in readers else _table_rows(self.path)


def open_rows(path: Path) -> RowFile:
    """Recognise the format of a data file from its content.

    Raises:
        DataError: If the file cannot be read, is empty, or is in none of the known formats.
    """
    if path.is_dir():
        raise DataError(f"{path}: found a folder; expected a data file. For a folder of a data set, use hub:{path}.")
    head = read_head(path, 64)
    for magic, found in FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path}: found {found}. Expected JSON, JSON lines, CSV, TSV or Parquet.")
    if head.startswith(PARQUET):
        return RowFile(path, "Parquet", _parquet_columns(path))
    first = next((line for line in read_lines(path) if line.strip()), None)
    if first is None:
        raise DataError(f"{path}: found an empty file; expected at least one row.")
    start = first.lstrip()[0]
    if start == "[":
        return RowFile(path, "JSON array")
    if start == "{":
        return RowFile(path, _json_kind(path, first))
    names = table_header(path)
    if len(names) < 2 and not is_table_name(path):
        raise DataError(
            f"{path}, line 1: found {shorten(first)}; expected JSON, JSON lines, Parquet, or a table with a header "
            "(CSV or TSV). Convert the file."
        )
    return RowFile(path, "TSV" if _delimiter(path) == "\t" else "CSV", names)


def open_json(path: Path) -> Any:
    """Return the value of a JSON file; None for a file in another format.

    Raises:
        DataError: If the file is empty or cannot be read.
    """
    return _whole_json(path) if open_rows(path).kind == "JSON array" else None


def is_table_name(path: Path) -> bool:
    """True if a file name ends in .csv or .tsv, with or without the suffix of a compression."""
    return without_compression_suffix(path.name).lower().endswith(DELIMITED)


def is_plain_text(path: Path) -> bool:
    """True for a text file by its name, and for another file that is neither JSON, Parquet, compressed nor a table."""
    name = without_compression_suffix(path.name).lower()
    if name.endswith(TEXT_SUFFIXES):
        return True
    head = read_head(path, 64)
    if name.endswith(SUFFIXES) or head.startswith((PARQUET, *MAGIC)):
        return False
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"{", b"[")


def _json_kind(path: Path, first: str) -> str:
    """Format of a file that begins with a brace: JSON lines, or one object that holds the rows."""
    try:
        value = parse_json(first)
    except JsonError:
        # an object over several lines begins with an open value; any other line is broken
        lines = without_compression_suffix(path.name).lower().endswith((".jsonl", ".ndjson"))
        several = not lines and first.rstrip().endswith(("{", "[", ","))
        return _object_kind(_whole_json(path)) or "JSON lines" if several else "JSON lines"
    return _object_kind(value) or "JSON lines"


def _object_kind(value: Any) -> str | None:
    """Format of an object whose field `data` holds the rows; None for any other object."""
    rows: Any = as_object(value).get("data")
    first = as_object(cast("list[Any]", rows)[0] if isinstance(rows, list) and rows else None)
    if not first:
        return None
    return "SQuAD JSON" if "paragraphs" in first else "JSON array"


def _whole_json(path: Path) -> Any:
    with open_bytes(path) as file:
        content = file.read()
    try:
        return parse_json(content)
    except JsonError as problem:
        line = "" if problem.line is None else f", line {problem.line}"
        raise DataError(
            f"{path}{line}: found {problem.reason}; expected JSON, or one JSON object on each line. Fix the file."
        ) from None


def _json_lines(path: Path) -> Iterator[Row]:
    numbered = ((number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip())
    for number, value in read_objects(path, numbered):
        yield from _object_row(f"{path}, line {number}", value)


def _json_items(path: Path) -> Iterator[Row]:
    value = _whole_json(path)
    items: Any = as_object(value).get("data", value)
    if not isinstance(items, list):
        raise DataError(f"{path}: found a {type(value).__name__}; expected a list of objects. Fix the file.")
    for number, item in enumerate(cast("list[Any]", items), start=1):
        yield from _object_row(f"{path}, item {number}", item)


def _object_row(where: str, value: Any) -> Iterator[Row]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {shorten(value)}; expected an object with named fields. Fix or remove it.")
    yield where, cast("dict[str, Any]", value)


def _squad_rows(path: Path) -> Iterator[Row]:
    """Yield one row per question of the nested format of SQuAD 1.1 and 2.0."""
    for place, article in _members(str(path), _whole_json(path), "data"):
        for where, paragraph in _members(place, article, "paragraphs"):
            for spot, question in _members(where, paragraph, "qas"):
                shared = {name: paragraph[name] for name in ("context",) if name in paragraph}
                title = {"title": article["title"]} if "title" in article else {}
                yield spot, {**title, **shared, **question}


def _members(where: str, holder: Mapping[str, Any], name: str) -> Iterator[Row]:
    items: Any = holder.get(name)
    if not isinstance(items, list):
        found = f"{shorten(items)} as field {name!r}" if name in holder else f"no field {name!r}"
        raise DataError(f"{where}: found {found}; expected a list of objects, as in SQuAD. Fix the file.")
    for number, item in enumerate(cast("list[Any]", items), start=1):
        yield from _object_row(f"{where}, {name} {number}", item)


def _parquet_columns(path: Path) -> tuple[str, ...]:
    import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]

    parquet: Any = pyarrow.parquet
    with reading(path):
        try:
            with parquet.ParquetFile(path) as file:
                return tuple(str(name) for name in file.schema_arrow.names)
        except Exception as error:
            # Arrow raises several types for damaged files
            raise _damaged_parquet(path, error) from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]

    parquet: Any = pyarrow.parquet
    number = 0
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise _damaged_parquet(path, error) from None
    with file:
        batches: Iterator[Any] = file.iter_batches(batch_size=_BATCH)
        while True:
            try:
                batch = next(batches, None)
                rows: list[dict[str, Any]] = [] if batch is None else batch.to_pylist()
            except Exception as error:
                raise _damaged_parquet(path, error) from None
            if batch is None:
                return
            for row in rows:
                number += 1
                yield f"{path}, row {number}", row


def _damaged_parquet(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(
        f"{path}: found damaged or truncated Parquet data ({ascii(reason)[1:-1]}); expected a complete file. Copy or "
        "download the file again."
    )


def table_header(path: Path) -> tuple[str, ...]:
    """Return the column names of a delimited file.

    Raises:
        DataError: If the header is empty, repeats a name, or could be comma- or tab-separated.
    """
    delimiter = _delimiter(path)
    cells = next(_cells(path, delimiter))[1]
    repeated = [name for name in cells if cells.count(name) > 1]
    if not all(name.strip() for name in cells) or repeated:
        found = f"the column {repeated[0]!r} twice" if repeated else "a column without a name"
        raise DataError(f"{path}, line 1: found {found}; expected a header of distinct names. Fix the header.")
    return tuple(cells)


def _delimiter(path: Path) -> str:
    """Return the delimiter of a table: tab, comma or semicolon, by its header."""
    first = next(iter(read_lines(path)), "")
    found = [mark for mark in ("\t", ",", ";") if mark in first]
    name = without_compression_suffix(path.name).lower()
    if "\t" in found and ("," in found or ";" in found):
        if not name.endswith(DELIMITED):
            raise DataError(
                f"{path}, line 1: found a header with tabs and commas; expected one kind. Name the file .csv or .tsv."
            )
        return "\t" if name.endswith(".tsv") else ","
    if not found:
        return "\t" if name.endswith(".tsv") else ","
    return "," if "," in found else found[0]


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every line that is not blank; quotes are literal in tab-separated files."""
    if delimiter == "\t":
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                yield number, line.split("\t")
        return
    # the default limit of 128 KiB is shorter than many documents
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(_ended(read_lines(path)), delimiter=delimiter, strict=True)
    while True:
        begun = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {begun}: found broken quoting ({error}); expected values separated by "
                f"{delimiter!r} in which quotes are paired. Fix the line."
            ) from None
        if cells is None:
            return
        if cells:
            yield begun, cells


def _ended(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield line + "\n"


def _table_rows(path: Path) -> Iterator[Row]:
    names: Sequence[str] = ()
    for number, cells in _cells(path, _delimiter(path)):
        if not names:
            names = table_header(path)
        elif len(cells) != len(names):
            raise DataError(
                f"{path}, line {number}: found {len(cells)} cells; expected {len(names)} "
                f"({listed(names, 80)}), as in the header. Fix the line; cells with the delimiter need "
                "quotes in CSV."
            )
        else:
            yield f"{path}, line {number}", dict(zip(names, cells, strict=True))
