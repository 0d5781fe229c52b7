"""Readers of foreign content: JSON, JSON lines, gzip, tensors; every failure is a GraftworkError with path and line."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from graftwork.errors import DataError, GraftworkError

_SUSPICIOUS = re.compile(r"\\u(?:0000|[dD][89a-fA-F])|[\0\ud800-\udfff]")
"""Escapes and characters of a JSON text that may encode NUL or half a surrogate pair."""
_UNPAIRED = re.compile("[\0\ud800-\udfff]")
_BLOCKED = re.compile(r"GLOBAL (\S+)")
_NAME_BYTES = 255
"""Longest file name that common file systems store."""


class JsonError(ValueError):
    """JSON that cannot be used: position and reason, for callers that add path and advice.

    Attributes:
        reason: Description of the fault.
        line: Line of the fault, from 1; None if unknown.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


def parse_json(text: str | bytes, *, any_text: bool = False) -> Any:
    """Parse one JSON value.

    Args:
        text: JSON; bytes must be UTF-8.
        any_text: Accept NUL characters and unpaired surrogates in strings, for files that Graftwork wrote itself.

    Raises:
        JsonError: If the text is not JSON, is nested too deeply, contains a number with too many digits, or a string
            that no tokenizer or file can store.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(decoded.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg}, column {error.colno}", error.lineno) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise JsonError(f"byte 0x{error.object[error.start]:02x} at position {error.start} is no UTF-8", line) from None
    except RecursionError:
        raise JsonError("values are nested too deeply") from None
    except ValueError:
        # the interpreter limits the conversion of digits to integers
        raise JsonError("a number has too many digits") from None
    if not any_text and _SUSPICIOUS.search(decoded) and (problem := text_problem(value)):
        raise JsonError(problem)
    return value


def text_problem(value: Any, field: str = "") -> str | None:
    """Return the field and the fault of the first string with a NUL character or half a surrogate pair, or None."""
    waiting: list[tuple[str, Any]] = [(field, value)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, str):
            if found := _UNPAIRED.search(item):
                fault = (
                    "a NUL character"
                    if found[0] == "\0"
                    else f"half a character, \\u{ord(found[0]):04x}, without the other half"
                )
                return f"{name or 'text'} contains {fault}"
        elif isinstance(item, Mapping):
            for key, inner in cast("Mapping[Any, Any]", item).items():
                label = ascii(key)[1:-1]
                waiting += [(f"the name of field '{label}'", key), (f"{name}.{label}" if name else label, inner)]
        elif isinstance(item, list | tuple):
            waiting += [(f"{name}[{index}]", inner) for index, inner in enumerate(cast("list[Any]", item))]
    return None


def read_bytes(path: Path, *, error: type[GraftworkError] = DataError) -> bytes:
    """Read a file.

    Raises:
        DataError: If the file cannot be read; or `error` in its place.
    """
    with reading(path, error=error):
        return path.read_bytes()


def read_text(path: Path, *, error: type[GraftworkError] = DataError) -> str:
    """Read a UTF-8 file; a byte-order mark is dropped and line ends are kept.

    Raises:
        DataError: If the file cannot be read or is not UTF-8; or `error` in its place.
    """
    content = read_bytes(path, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise error(
            f"{path}, line {line}: found byte 0x{content[problem.start]:02x}; expected UTF-8. Convert the file, for "
            "example with `iconv -t utf-8`."
        ) from None


def read_json_file(
    path: Path, *, error: type[GraftworkError] = DataError, advice: str = "Fix the file or restore it."
) -> Any:
    """Read a JSON file of foreign origin.

    Raises:
        DataError: If the file cannot be read or is not JSON; or `error` in its place. The message names the line.
    """
    try:
        return parse_json(read_bytes(path, error=error))
    except JsonError as problem:
        line = "" if problem.line is None else f", line {problem.line}"
        raise error(f"{path}{line}: found {problem.reason}; expected JSON. {advice}") from None


def read_json_mapping(path: Path, *, error: type[GraftworkError] = DataError) -> dict[str, Any]:
    """Read a JSON file whose value is an object.

    Raises:
        DataError: If the file is anything else; or `error` in its place.
    """
    value = read_json_file(path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: found a {type(value).__name__}; expected a JSON object. Restore the file.")
    return cast("dict[str, Any]", value)


@contextmanager
def reading(path: Path, *, error: type[GraftworkError] = DataError) -> Generator[None]:
    """Compare a file with its checksum, and convert the errors of opening, reading and decompressing it.

    Raises:
        DataError: If the file cannot be read, its compression is damaged, or it differs from the checksum in the file
            `NAME.sha256` beside it; or `error` in its place.
    """
    try:
        _verify_checksum(path, error)
        yield
    except GraftworkError:
        raise
    except (EOFError, zlib.error) as problem:
        raise error(f"{path}: found damaged compressed data ({problem}). Copy or download the file again.") from problem
    except (OSError, ValueError) as problem:
        # open() raises ValueError for a path with a NUL character
        if isinstance(problem, ValueError) and "null byte" not in str(problem):
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: found {reason}; expected a readable file. Check the path.") from problem


def checksum_file(path: Path) -> Path:
    """File with the SHA-256 of another one, in the format of `sha256sum`."""
    return path.with_name(f"{path.name}.sha256")


def _verify_checksum(path: Path, error: type[GraftworkError]) -> None:
    file = checksum_file(path)
    if not file.is_file():
        return
    recorded = file.read_bytes()[:64].decode("ascii", "replace").lower()
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if re.fullmatch("[0-9a-f]{64}", recorded) and found != recorded:
        raise error(
            f"{path} has changed since it was written: its SHA-256 differs from the one in {file.name}. Write it "
            f"again, or remove {file.name} if the change is intended."
        )


@contextmanager
def fields_of(where: str, expected: str, *, error: type[GraftworkError] = DataError) -> Generator[None]:
    """Convert the errors of taking fields out of a parsed record: missing fields and values of a wrong type.

    Args:
        where: File and line of the record.
        expected: Description of a valid record.
        error: Type of the error to raise.

    Raises:
        DataError: If the block raises a KeyError, TypeError, AttributeError, IndexError, ValueError or OverflowError.
    """
    try:
        yield
    except GraftworkError:
        raise
    except KeyError as problem:
        name = problem.args[0] if problem.args else ""
        raise error(f"{where}: found no field {name!r}; expected {expected}. Fix or remove the record.") from None
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RecursionError) as problem:
        raise error(
            f"{where}: found a field of a wrong type ({_line(problem)}); expected {expected}. Fix or remove the record."
        ) from None


def require(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of a record, checked for its type; booleans are not accepted as numbers.

    Raises:
        DataError: If the record is no object, or the field is missing or of another type.
    """
    words = " or ".join(_KINDS.get(one, one.__name__) for one in (kind if isinstance(kind, tuple) else (kind,)))
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: found a {type(record).__name__}; expected an object with the field {name!r}.")
    fields = cast("Mapping[str, Any]", record)
    if name not in fields:
        raise DataError(
            f"{where}: found no field {name!r} but {', '.join(map(repr, list(fields)[:9])) or 'an empty object'}; "
            f"expected {words}. Fix or remove the record."
        )
    value = fields[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DataError(
            f"{where}: found {shorten(value)} as field {name!r}; expected {words}. Fix or remove the record."
        )
    return value


_KINDS: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "an object",
    float: "a number",
}


def shorten(value: Any, length: int = 60) -> str:
    """Return the representation of a value as printable text of limited length."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def read_tensors(path: Path, *, error: type[GraftworkError] = DataError, advice: str = "Check the file.") -> Any:
    """Read tensors and plain containers from a file of `torch.save`; no code in it is executed.

    Args:
        path: Foreign `.pt`, `.pth` or `.bin` file.
        error: Type of the error to raise.
        advice: Last sentence of the error.

    Raises:
        DataError: If the file cannot be read, is damaged, or contains other objects; or `error` in its place.
    """
    import torch

    read_head(path, error=error)
    try:
        with warnings.catch_warnings():
            # warnings about pickle protocols
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content)
    except Exception as problem:
        # torch.load raises anything its parser meets in damaged bytes, and advises to switch the protection off
        blocked = _BLOCKED.search(str(problem))
        reason = f"contains {blocked[1]}, which would run code" if blocked else f"{type(problem).__name__} in its data"
        raise error(
            f"{path} is not readable as tensors in plain containers ({reason}). Pickled objects are refused, because "
            f"reading them runs code. {advice}"
        ) from None
    return content


def _check_tensors(content: Any) -> None:
    """Raise a ValueError for tensors that are no ordinary ones: sparse, without storage, or larger than their storage.

    A few damaged bytes can describe a tensor of any size with stride 0, which the next conversion would allocate.
    """
    import torch

    waiting, seen = [content], set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized:
                raise ValueError("an unusual tensor")
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError("a tensor larger than its data")
        elif isinstance(item, Mapping):
            waiting += [part for pair in cast("Mapping[Any, Any]", item).items() for part in pair]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += cast("list[Any]", list(item))


def read_head(path: Path, size: int = 8, *, error: type[GraftworkError] = DataError) -> bytes:
    """Read the first bytes of a file.

    Raises:
        DataError: If the file cannot be opened; or `error` in its place.
    """
    with reading(path, error=error), path.open("rb") as file:
        return file.read(size)


def join_inside(folder: Path, name: Any, where: str) -> Path:
    """Join a file name that was read from a file to a folder, and refuse names that lead out of the folder.

    Args:
        folder: Folder that contains the file.
        name: Relative name from a file.
        where: File and field of the name, for the error message.

    Raises:
        DataError: If the name is no text, is absolute, contains `..`, or is no possible file name.
    """
    windows = PureWindowsPath(name) if isinstance(name, str) else None
    unsafe = (
        windows is None
        or not windows.parts
        or bool(windows.anchor)
        or ".." in windows.parts
        or text_problem(name) is not None
        or any(len(part.encode()) > _NAME_BYTES for part in windows.parts)
    )
    if unsafe:
        raise DataError(
            f"{where}: found the file name {shorten(name)}; expected a name inside {folder}. Fix the name, and use "
            "files of unknown origin with care."
        )
    return folder / str(name)


def read_objects(path: Path, lines: Iterator[tuple[int, str | bytes]]) -> Iterator[tuple[int, Any]]:
    """Parse the lines of a JSON-lines file, passed as pairs of line number and text.

    Raises:
        DataError: If a line is not JSON; the message names file and line.
    """
    for number, line in lines:
        try:
            yield number, parse_json(line)
        except JsonError as problem:
            shown = line if isinstance(line, str) else line.decode(errors="replace")
            raise DataError(
                f"{path}, line {number}: found {shorten(shown)}, not JSON ({problem.reason}); expected one JSON value "
                "on each line. Fix or remove the line."
            ) from None


def _line(problem: Exception) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return ascii(text)[1:-1][:120]
