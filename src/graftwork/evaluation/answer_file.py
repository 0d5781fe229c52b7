"""Answers in a JSON-lines file: appended as they are generated, reused by a later call, read back one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from graftwork.core import faults
from graftwork.core.example import Example
from graftwork.core.files import (
    append_record,
    drop_torn_line,
    read_json,
    read_line_at,
    read_lines,
    read_lines_at,
    write_record,
)
from graftwork.core.storage import writing
from graftwork.errors import ConfigError

_KNOWN = ("row", "id", "input", "answers")
"""Fields of a line that describe the row."""


class AnswerFile:
    """File of answers with the cache key beside it; cached answers with another key are discarded.

    Args:
        path: JSON-lines file.
        count: Number of rows to answer.
        identity: Cache key: everything that the answers depend on.

    Raises:
        ConfigError: If the file exists and has no cache key, so that it was not written by this class.
        DataError: If a line has changed since it was written.
    """

    def __init__(self, path: Path, count: int, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self._offsets = np.full(count, -1, dtype=np.int64)
        sidecar = settings_file(path)
        if path.exists() and not sidecar.exists():
            raise ConfigError(f"{path} exists and was not written by Graftwork. Give another file, or remove it.")
        self._valid = path.exists() and read_json(sidecar) == identity
        if self._valid:
            drop_torn_line(path)
            self._read()

    def __contains__(self, row: int) -> bool:
        return bool(self._offsets[row] >= 0)

    def __len__(self) -> int:
        """Number of answers in the file."""
        return int((self._offsets >= 0).sum())

    def begin(self) -> None:
        """Remove the answers of another cache key, and write the own one; nothing happens if it is there already.

        Called after the first batch: a model that cannot answer must not delete cached answers.
        """
        if self._valid:
            return
        with writing(self.path):
            self.path.unlink(missing_ok=True)
            faults.point("prediction.cleared", self.path)
        write_record(settings_file(self.path), self.identity)
        self._valid = True

    def append(self, index: int, row: Example, record: Mapping[str, Any]) -> None:
        """Append the answer to a row."""
        about = {"row": index, "id": row.key, "input": row.text, "prediction": record["prediction"]}
        self._append({**about, "answers": list(row.answers), **record})

    def _append(self, line: Mapping[str, Any]) -> None:
        append_record(self.path, line)
        # the position is read by `answers`; until then only its presence counts
        self._offsets[line["row"]] = 0

    def absorb(self) -> None:
        """Move the answers of other processes into this file; those with another cache key are discarded."""
        for path in sorted(self.path.parent.glob(f"{part_file(self.path, '*').name}")):
            part = AnswerFile(path, len(self._offsets), self.identity)
            for line in read_lines(path) if part._valid else ():
                if line["row"] not in self:
                    self.begin()
                    self._append(line)
            with writing(path):
                path.unlink()
                settings_file(path).unlink()
        if self._valid:
            self._read()

    def answers(self) -> Sequence[Mapping[str, Any]]:
        """Answers in the order of the rows; each is read on access."""
        self._read()
        return StoredAnswers(self.path, self._offsets)

    def _read(self) -> None:
        for offset, line in read_lines_at(self.path):
            self._offsets[line["row"]] = offset


class StoredAnswers(Sequence[Mapping[str, Any]]):
    """Answers in a file.

    Args:
        path: JSON-lines file.
        offsets: Position in bytes of the line of each row.
    """

    def __init__(self, path: Path, offsets: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.path = path
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        if isinstance(index, slice):
            return StoredAnswers(self.path, self._offsets[index])
        return _answer(read_line_at(self.path, int(self._offsets[index])))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[index] for index in range(len(self)))


def part_file(output: Path, process: int | str) -> Path:
    """File of the answers of one process, beside `output`."""
    return output.with_name(f".{output.stem}.process-{process}{output.suffix}")


def settings_file(output: Path) -> Path:
    """File with the cache key of the answers in `output`."""
    return output.with_suffix(".settings.json")


def _answer(line: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in line.items() if name not in _KNOWN}
