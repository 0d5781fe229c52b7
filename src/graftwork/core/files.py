"""Atomic reading and writing of files: a process killed at any moment leaves the old or the new content."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO, cast

from graftwork.core import faults
from graftwork.core.readers import JsonError, checksum_file, parse_json
from graftwork.core.storage import storage_error, writing
from graftwork.core.systems import is_alive
from graftwork.errors import CheckpointMismatchError, DataError, IncompleteRunError, StorageError

DIGEST_KEY = "sha256"
"""Field of a JSON object that contains the SHA-256 of its other fields."""
_BLOCK = 2**16
LINE_DIGITS = 16
"""Hexadecimal digits of the SHA-256 of a line."""
_HOST = blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
"""Part of the names of temporary files: processes of other machines may use the same folder."""


@contextmanager
def replace_file(path: Path) -> Generator[TextIO, None, None]:
    """Open a temporary text file that is renamed to `path` once it is complete.

    Args:
        path: File to write; its parent folder is created.

    Raises:
        StorageError: If the file cannot be written, such as a full disk; the message names the path.
    """
    with _temporary(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """Path of a file that is renamed to `path` at the end of the block; those of killed processes are removed."""
    prefix, suffix = f".{path.name}.{_HOST}-", ".part"
    temporary = path.with_name(f"{prefix}{os.getpid()}{suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
            process = other.name.removeprefix(prefix).removesuffix(suffix)
            if process.isdigit() and not is_alive(int(process)):
                other.unlink(missing_ok=True)
        try:
            yield temporary
            faults.point("file.written", path)
            temporary.replace(path)
            faults.point("file.replaced", path)
        finally:
            # on a read-only file system, the error that is being raised is the one that counts
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replace_file(path) as file:
        file.write(text)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a binary file, such as an image, atomically.

    Raises:
        StorageError: If the file cannot be written, such as a full disk; the message names the path.
    """
    with _temporary(path) as temporary:
        temporary.write_bytes(content)


def write_checksum(path: Path) -> None:
    """Write the SHA-256 of a file to `NAME.sha256` beside it; the readers of data compare it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_text(checksum_file(path), f"{digest}  {path.name}\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Convert a value to valid JSON: NaN and infinity become null, and half a surrogate pair stays escaped."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # UTF-8 cannot encode half a surrogate pair, which file names may contain
    return text if _is_encodable(text) else json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in cast("list[Any]", value)]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a file of valid JSON atomically; NaN and infinity become null."""
    write_text(path, to_json(value, indent=2) + "\n")


def content_digest(value: Any) -> str:
    """SHA-256 of a value as JSON, independent of layout and of the order of keys."""
    plain = json.loads(to_json(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object together with its own SHA-256, which `read_json` verifies."""
    write_json(path, {**value, DIGEST_KEY: content_digest(value)})


def read_json(path: Path) -> Any:
    """Read a JSON file that Graftwork wrote; the digest of `write_record` is verified and removed.

    Raises:
        CheckpointMismatchError: If the file is not JSON (the message names the line), or has changed since it was
            written.
        IncompleteRunError: If the file does not exist.
        StorageError: If the file cannot be read.
    """
    value = _parse_file(path)
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        return cast("Any", value)
    content = cast("dict[str, Any]", value)
    recorded = content.pop(DIGEST_KEY)
    if content_digest(content) != recorded:
        raise CheckpointMismatchError(
            f"{path} has changed since it was written: its content has another SHA-256 than the one recorded in it. "
            "Restore the file, or run the stage that wrote it again."
        )
    return content


def _parse_file(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), any_text=True)
    except FileNotFoundError:
        raise IncompleteRunError(f"Found no {path}. Restore it, or run the stage that writes it again.") from None
    except OSError as error:
        raise storage_error(error, path) or StorageError(f"Cannot read {path}: {error}. Check the path.") from error
    except JsonError as problem:
        line = "" if problem.line is None else f", line {problem.line}"
        raise CheckpointMismatchError(
            f"{path}{line} is not readable as JSON ({problem.reason}). Restore it, or run the stage that wrote it "
            "again."
        ) from None


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it to the operating system.

    Raises:
        StorageError: If the line cannot be written, such as a full disk; the message names the path.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        faults.point("line.append", path)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(_line(row) + "\n")
        faults.point("line.appended", path)


def append_record(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line with its own digest, which `read_lines` verifies.

    Raises:
        StorageError: If the line cannot be written, such as a full disk; the message names the path.
    """
    append_line(path, signed_line(row))


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines atomically, each with its own digest, which `read_lines` verifies."""
    with replace_file(path) as file:
        # escaped, because other readers split lines at U+2028
        file.writelines(json.dumps(signed_line(row)) + "\n" for row in rows)


def signed_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the first digits of its SHA-256 as a further field."""
    return {**row, DIGEST_KEY: content_digest(row)[:LINE_DIGITS]}


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if _is_encodable(text) else json.dumps(row)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON lines that `append_line` wrote; an incomplete last line is skipped.

    The digests of lines are verified and removed; either all lines of a file have one or none.

    Raises:
        DataError: If any other line is not JSON, or a line has changed since it was written.
    """
    return (content for _, content in read_lines_at(path))


def read_lines_at(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSON lines as `read_lines` does, each with its position in the file in bytes.

    Raises:
        DataError: As `read_lines`.
    """
    if not path.exists():
        return
    signed: bool | None = None
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and not _is_whole(line):
                return
            content, own = _parse_line(path, number, line)
            signed = own if signed is None else signed
            if signed != own:
                raise _damaged_line(path, number, _CHANGED)
            yield offset, content
            offset += len(line)


def read_line_at(path: Path, offset: int) -> dict[str, Any]:
    """Read the JSON line at a position in bytes, and verify its digest.

    Raises:
        DataError: If the line is not JSON, or has changed since it was written.
        StorageError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
            try:
                return _parse_line(path, 0, line)[0]
            except DataError:
                # the number is only needed for the message
                file.seek(0)
                number = file.read(offset).count(b"\n") + 1
    except OSError as error:
        raise storage_error(error, path) or StorageError(f"Cannot read {path}: {error}. Check the path.") from error
    return _parse_line(path, number, line)[0]


_CHANGED = "changed since it was written; its SHA-256 differs"


def _parse_line(path: Path, number: int, line: bytes) -> tuple[dict[str, Any], bool]:
    """Object of a JSON line without its digest, and True if it had one."""
    try:
        row = parse_json(line, any_text=True)
    except JsonError as problem:
        raise _damaged_line(path, number, f"not readable as JSON ({problem.reason})") from None
    if not isinstance(row, dict):
        raise _damaged_line(path, number, f"found a {type(row).__name__}; expected an object")
    content = cast("dict[str, Any]", row)
    recorded = content.pop(DIGEST_KEY, None)
    if recorded is not None and content_digest(content)[:LINE_DIGITS] != recorded:
        raise _damaged_line(path, number, _CHANGED)
    return content, recorded is not None


def _is_whole(line: bytes) -> bool:
    """True if an object ends one byte before the end of a line without line feed, so that the line feed has changed."""
    try:
        return isinstance(parse_json(line[:-1], any_text=True), dict)
    except JsonError:
        return False


def _damaged_line(path: Path, number: int, problem: str) -> DataError:
    return DataError(f"{path}, line {number}: {problem}. Remove the file to compute it again.")


def drop_torn_line(path: Path) -> None:
    """Truncate a last line without line feed, left by a killed process, so that lines can be appended."""
    if not path.exists():
        return
    start, line = _last_line(path)
    if line and not line.endswith(b"\n") and not _is_whole(line):
        with path.open("rb+") as file:
            file.truncate(start)


def _last_line(path: Path) -> tuple[int, bytes]:
    """Position and content of the last line of a file, read from its end."""
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        line = b""
        while start:
            step = min(start, _BLOCK)
            start -= step
            file.seek(start)
            line = file.read(step) + line
            # a line feed at the very end belongs to the last line
            if (found := line.rfind(b"\n", 0, len(line) - 1)) >= 0:
                return start + found + 1, line[found + 1 :]
    return 0, line


def remove_path(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; nothing happens if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def swap_folder(new: Path, target: Path) -> None:
    """Replace a folder by a complete new one; `recover_folder` repairs a kill between the two renames."""
    old = target.with_name(f"{target.name}.old")
    with writing(target):
        shutil.rmtree(old, ignore_errors=True)
        faults.point("folder.complete", target)
        if target.exists():
            target.rename(old)
        faults.point("folder.moved", target)
        new.rename(target)
        faults.point("folder.swapped", target)
        shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Restore the old folder if `swap_folder` was killed between its two renames."""
    old = target.with_name(f"{target.name}.old")
    if not target.exists() and old.exists():
        old.rename(target)


def apply_umask(path: Path) -> None:
    """Give files that a library created with mode 0600 the mode of other new files, so that colleagues can open a run.

    Args:
        path: A file, or a folder with all files below it; nothing happens if it does not exist.
    """
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()] if path.is_dir() else [path]
    private = [file for file in files if file.exists() and stat.S_IMODE(file.stat().st_mode) == 0o600]
    if not private:
        return
    # a new file shows the umask; os.umask would change it for other threads for a moment
    probe = private[0].with_name(f".{private[0].name}.{os.getpid()}.part")
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in private:
        file.chmod(mode)
