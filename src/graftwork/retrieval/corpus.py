"""Streaming reader of corpora: tab-separated files in DPR's format, or JSON lines."""

from __future__ import annotations

import csv
import glob
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

from graftwork.core.readers import JsonError, parse_json, reading
from graftwork.errors import DataError
from graftwork.retrieval.compact_ids import CompactIds
from graftwork.retrieval.retriever import UNUSABLE_IN_IDS, Passage

_SHOWN = 5
_DIGEST_MODULUS = 1 << 128


@dataclass(slots=True)
class CorpusReader:
    """Iterator over the passages of a corpus, with counts and a digest.

    Malformed rows are counted and reported; a duplicate id is an error, because one of the two passages would be lost.
    """

    files: tuple[Path, ...]
    count: int = 0
    """Number of passages yielded so far."""
    malformed: int = 0
    """Number of malformed rows."""
    row_bytes: int = 0
    """Size of the rows of the yielded passages."""
    digest: int = 0
    """Order-independent digest: sum of the digests of the passages."""
    complaints: list[str] = field(default_factory=list[str])
    """First malformed rows, with file, line and reason."""
    _ids: CompactIds = field(default_factory=CompactIds)

    def __iter__(self) -> Iterator[Passage]:
        for path in self.files:
            yield from self._read(path)

    def _read(self, path: Path) -> Iterator[Passage]:
        with reading(path), _open(path) as file:
            lines = enumerate(file, start=1)
            parse = _parse_json if _kind(path) == "json" else _table_parser(path, next(lines, (1, b""))[1])
            for number, line in lines:
                passage = self._passage(path, number, line, parse)
                if passage is not None:
                    yield passage

    def _passage(
        self, path: Path, number: int, line: bytes, parse: Callable[[str], Passage | str | None]
    ) -> Passage | None:
        try:
            found = parse(line.decode())
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at position {error.start} is no UTF-8"
        if isinstance(found, Passage):
            found = ("a NUL character" if b"\0" in line else _problem(found)) or found
        if found is None:
            return None
        if isinstance(found, str):
            self.malformed += 1
            if len(self.complaints) < _SHOWN:
                self.complaints.append(f"{path}, line {number}: {found}")
            return None
        digest = found.digest()
        # 64-bit hash of the id: among 1e9 ids the probability of a collision, reported as a duplicate, is 3 %
        key = int.from_bytes(blake2b(found.id.encode(), digest_size=8).digest(), "little")
        if not self._ids.add(key):
            raise DataError(
                f"{path}, line {number}: found the id {found.id!r} a second time; expected every id once. "
                "Give the passages different ids."
            )
        self.count += 1
        self.row_bytes += len(line)
        self.digest = (self.digest + digest) % _DIGEST_MODULUS
        return found

    def summary(self) -> dict[str, Any]:
        """Description of the source in a commit record."""
        return {
            "files": [path.name for path in self.files],
            "rows": self.count + self.malformed,
            "malformed": self.malformed,
            "bytes": self.row_bytes,
            "digest": f"{self.digest:032x}",
        }


def find_corpus(pattern: str | Path) -> tuple[Path, ...]:
    """Files of a corpus, sorted by name: one file, all files of a folder, or the matches of a glob pattern.

    Raises:
        DataError: If there is no file, or a file has an unknown format.
    """
    path = Path(pattern)
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if _kind(file)]
    elif path.exists():
        found = [path]
    else:
        found = sorted(map(Path, glob.glob(str(pattern))))
    if not found:
        raise DataError(
            f"Found no corpus at {pattern}; expected a .tsv or .jsonl file, a folder of them, or a pattern."
        )
    for file in found:
        if not _kind(file):
            raise DataError(
                f"{file}: found an unknown kind of file; expected .tsv or .jsonl, possibly with .gz behind."
            )
    return tuple(found)


def add_digest(total: int, *passages: Passage, sign: int = 1) -> int:
    """Digest sum after passages are added, or removed (sign −1)."""
    return (total + sign * sum(passage.digest() for passage in passages)) % _DIGEST_MODULUS


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return "json"
    return "table" if name.endswith(".tsv") else None


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _table_parser(path: Path, header: bytes) -> Callable[[str], Passage | str | None]:
    names = header.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    missing = [name for name in ("id", "text", "title") if name not in names]
    if missing:
        raise DataError(
            f"{path}, line 1: found the columns {', '.join(map(repr, names))}; expected id, text and title. "
            "Put this header above the rows."
        )
    id_at, text_at, title_at = (names.index(name) for name in ("id", "text", "title"))

    def parse(line: str) -> Passage | str | None:
        line = line.rstrip("\r\n")
        cells: list[str] | None = line.split("\t")
        if len(cells) != len(names):
            if not line.strip():
                return None
            # tabs inside quotes are rare; only these rows are parsed by the slower csv module
            cells = _csv_cells(line)
        elif '"' in line:
            for index, cell in enumerate(cells):
                if cell[:1] == '"':
                    if len(cell) < 2 or cell[-1] != '"' or '"' in cell[1:-1].replace('""', ""):
                        cells = _csv_cells(line)
                        break
                    cells[index] = cell[1:-1].replace('""', '"')
        if cells is None:
            return "a quote is still open at its end"
        if len(cells) != len(names):
            return f"found {len(cells)} columns instead of {len(names)}"
        return Passage(cells[id_at], cells[text_at], cells[title_at])

    return parse


def _csv_cells(line: str) -> list[str] | None:
    """Cells of a line as Python's csv module reads them; None if a quote is open at its end."""
    end = "end of the line"
    rows = csv.reader([line, end], delimiter="\t")
    try:
        first = next(rows)
        # an open quote continues on the next line
        return first if next(rows, None) == [end] else None
    except csv.Error:
        return None


def _parse_json(line: str) -> Passage | str | None:
    if not line.strip():
        return None
    try:
        value = parse_json(line)
    except JsonError as problem:
        return f"no usable JSON: {problem.reason}"
    if not isinstance(value, dict):
        return f"found a {type(value).__name__} instead of an object"
    row = cast("dict[str, object]", value)
    name: object = row.get("_id", row.get("id"))
    text, title = row.get("text"), row.get("title")
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not isinstance(text, str) or not isinstance(title, str | None):
        return "expected the fields _id, text and title to be strings"
    passage = Passage(name, text, title or "")
    return surrogate_in(f"{passage.id}{passage.text}{passage.title}") or passage


def _problem(passage: Passage) -> str | None:
    """Reason for which a passage cannot be indexed; None if there is none."""
    if not passage.id or not passage.text.strip():
        return "no text" if passage.id else "no id"
    if "\0" in passage.text or "\0" in passage.title:
        return "a NUL character"
    unusable = UNUSABLE_IN_IDS.search(passage.id)
    return unusable and f"the control character U+{ord(unusable[0]):04X} in the id; expected one line"


def surrogate_in(text: str) -> str | None:
    """Description of the first lone surrogate in a text; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a character, \\u{ord(error.object[error.start]):04x}, has no other half"
    return None
