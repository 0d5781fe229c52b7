"""Records of large files, read anew on each pass, and cache keys of what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, overload

from graftwork.core.compression import without_compression_suffix
from graftwork.core.digests import file_digest
from graftwork.core.readers import checksum_file
from graftwork.core.storage import disk_error
from graftwork.core.version import __version__
from graftwork.errors import DataError
from graftwork.tasks.sources import Record

LARGE = 16 * 2**20
"""Bytes of text from which a file is streamed; smaller ones are read into memory."""
_DENSE = 4
"""Assumed ratio of the text of a compressed or columnar file to its size."""


class RecordStream(Sequence[Record]):
    """Records that are read anew on each pass.

    Args:
        make: Starts a pass.
        count: Number of records.
        key: Digest of their source and definition.
    """

    def __init__(self, make: Callable[[], Iterator[Record]], count: int, key: str | None) -> None:
        self._make = make
        self._count = count
        self.key = key

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            wanted = range(len(self))[index]
            found = dict(zip(sorted(wanted), self._at(sorted(wanted)), strict=True))
            return tuple(found[position] for position in wanted)
        return next(self._at([range(len(self))[index]]))

    def _at(self, positions: Sequence[int]) -> Iterator[Record]:
        chosen = set(positions)
        return (record for number, record in enumerate(self._make()) if number in chosen)

    def first(self, count: int) -> list[Record]:
        """The first records."""
        return list(islice(self._make(), count))


def is_large(path: Path) -> bool:
    """True if a data file is streamed rather than read into memory."""
    try:
        size = path.stat().st_size
    except OSError:
        return False
    name = path.name.lower()
    dense = without_compression_suffix(name) != name or name.endswith(".parquet")
    return size * (_DENSE if dense else 1) >= LARGE


def source_key(path: Path, *definition: object) -> str:
    """Digest of the content of a file and of what its rows depend on, under which derived data is cached.

    Args:
        path: The file.
        definition: Values whose `repr` is the same in every process.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        status = path.stat()
        content = _content(str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        checksum = checksum_file(path)
        expected = checksum.read_text(encoding="utf-8", errors="replace") if checksum.exists() else ""
    except OSError as error:
        raise disk_error(error) or DataError(f"{path}: {error.strerror or error}. Check the path.") from error
    return sha256("\0".join([__version__, content, expected, *map(repr, definition)]).encode()).hexdigest()[:32]


@lru_cache(maxsize=64)
def _content(path: str, size: int, modified: int, inode: int) -> str:
    return file_digest(Path(path))


def derived_key(key: str | None, function: Any, *settings: object) -> str | None:
    """Cache key of what a function makes of records; None if the records have none or the function has no fixed name.

    Args:
        key: Key of the records.
        function: A function of a module, or a frozen dataclass that is callable.
        settings: Further values that the result depends on.
    """
    name = _name(function)
    if key is None or name is None:
        return None
    return sha256("\0".join([key, name, *map(repr, settings)]).encode()).hexdigest()[:32]


def _name(function: Any) -> str | None:
    if is_dataclass(function) and not isinstance(function, type):
        text = repr(function)
        # an object without a representation of its own shows its address
        return None if " at 0x" in text else f"{type(function).__module__}.{text}"
    qualified = getattr(function, "__qualname__", None)
    if qualified is None or "<" in qualified or hasattr(function, "__self__"):
        return None
    return f"{function.__module__}.{qualified}"
