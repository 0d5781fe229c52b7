"""Files that a kill at any moment leaves old or new, never half."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from graftwork.errors import CheckpointMismatchError, DataError


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes its name only once it is complete, so that a killed run leaves no half file.

    Args:
        path: The file to write; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old content or the new, never a part."""
    with replace_file(path) as file:
        file.write(text)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file of bytes, such as a picture, so that a reader finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointMismatchError: If the file is no JSON; names the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointMismatchError(
            f"{path}{line} is not readable as JSON ({error}). Restore it, or run the stage that wrote it again."
        ) from None


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and hand it to the operating system at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read JSON lines that `append_line` wrote; a last line that a kill cut short is left out.

    Raises:
        DataError: If any other line is broken.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(
                    f"{path}, line {number}: not readable as JSON. Remove the file to compute it again."
                ) from None


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that has no line feed, so that appending goes on behind whole lines."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def swap_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another; `recover_folder` mends a kill between the two renames."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Take back the old folder if `swap_folder` was killed between its renames."""
    old = target.with_name(f"{target.name}.old")
    if not target.exists() and old.exists():
        old.rename(target)
