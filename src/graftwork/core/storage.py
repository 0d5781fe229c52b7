"""Errors of disks and permissions, whichever library raises them: full, over quota, read-only."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from graftwork.core import systems
from graftwork.errors import DiskFullError, GraftworkError, ReadOnlyError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_WORDS = {
    os.strerror(code): code for code in (*_FULL, *_READ_ONLY, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.EISDIR)
}
"""Error numbers by the text that libraries without an error number put into their messages."""
_NUMBER = re.compile(r"os error (\d+)|\[?[Ee]rrno (\d+)")
_SILENT_WRITERS = ("PytorchStreamWriter", "iostream error", "unexpected pos", "io::Error most likely")
"""Words of writing errors that do not contain a reason: torch, C++ streams, tantivy."""
_NO_REASON = 0
"""Error number of a failed write without a reason."""
_ALMOST_FULL = 1 << 20
"""Free bytes below which a failed write without a reason is attributed to a full disk."""


@contextmanager
def writing(path: str | Path) -> Generator[None]:
    """Convert errors of disks and permissions in this block, from any library, to errors that name the path.

    Raises:
        DiskFullError: If the disk or the quota is full, or the file is larger than permitted.
        ReadOnlyError: If the folder cannot be written.
        StorageError: For any other error of the operating system.
    """
    try:
        yield
    except GraftworkError:
        raise
    except Exception as error:
        found = storage_error(error, path)
        if found is None:
            raise
        raise found from error


def storage_error(error: BaseException, path: str | Path | None = None) -> StorageError | None:
    """Return the error of the disk or of permissions behind an exception of any library, or None.

    Args:
        error: Exception; the exceptions that caused it are searched too.
        path: File or folder that was written; None takes the file name of the exception.
    """
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        if isinstance(current, StorageError):
            return current
        seen.add(id(current))
        code = _error_number(current, path)
        if code is not None:
            named = getattr(current, "filename", None)
            return _describe(code, str(path if path is not None else named or "a file"))
        current = current.__cause__ or current.__context__
    return None


def disk_error(error: BaseException, path: str | Path | None = None) -> DiskFullError | ReadOnlyError | None:
    """Return `storage_error` if it is a full disk or a missing permission, which no damaged file can cause."""
    found = storage_error(error, path)
    return found if isinstance(found, DiskFullError | ReadOnlyError) else None


def _error_number(error: BaseException, path: str | Path | None) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        # a closed pipe or connection is no matter of the disk
        return None if isinstance(error, ConnectionError) else error.errno
    text = str(error)
    if any(words in text for words in _SILENT_WRITERS):
        return errno.ENOSPC if _is_almost_full(path) else _NO_REASON
    if found := _NUMBER.search(text):
        code = int(found[1] or found[2])
        return code if code in errno.errorcode else None
    return next((code for words, code in _WORDS.items() if words in text), None)


def _is_almost_full(path: str | Path | None) -> bool:
    place = Path("." if path is None else path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free < _ALMOST_FULL


def _describe(code: int, path: str) -> StorageError:
    if code == _NO_REASON:
        return StorageError(
            f"Cannot write {path}: the write was cut short without a reason. A full disk, a quota or a size limit is "
            "likely. Free space or choose another disk, and run the same command again."
        )
    reason = os.strerror(code)
    if code in _FULL:
        return DiskFullError(
            f"Cannot write {path}: {reason}. Files written before are intact. Free space, raise the quota, or choose "
            "another disk, and run the same command again."
        )
    if code in _READ_ONLY:
        opened = " Close programs that have it open." if systems.WINDOWS else ""
        return ReadOnlyError(
            f"Cannot use {path}: {reason}. Expected permission to read and write.{opened} Change the permissions, or "
            "choose another folder."
        )
    return StorageError(f"Cannot use {path}: {reason}. Check that the path exists and can be read and written.")
