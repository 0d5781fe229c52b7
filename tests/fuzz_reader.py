"""A reader of files with a small valid input, and counts of the records of an input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Reader:
    """One reader: a valid input, the function, and the number of records of an input if it can be counted."""

    file: str
    content: bytes
    read: Read
    others: tuple[tuple[str, bytes], ...] = ()
    """Further files next to the input; they stay valid."""
    records: Callable[[bytes], int | None] | None = None
    """Number of records of an input that was read without an error."""


def lines_of(content: bytes) -> int:
    return sum(bool(line.strip()) for line in content.decode("utf-8-sig", "replace").split("\n"))


def items_of(content: bytes) -> int:
    return len(json.loads(content.decode("utf-8-sig")))


def rows_below_header(content: bytes) -> int:
    lines = content.split(b"\n")
    return len(lines) - 1 - (not lines[-1])


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def dump_lines(values: list[Any]) -> bytes:
    return b"".join(dump(value) + b"\n" for value in values)
