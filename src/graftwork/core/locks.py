"""Locks between processes that write to the same folder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from graftwork.core.storage import writing
from graftwork.errors import ConfigError, GraftworkError, StorageError


@contextmanager
def locked(
    file: Path,
    busy: str,
    *,
    timeout: float = 0,
    reentrant: bool = False,
    error: type[GraftworkError] = ConfigError,
) -> Generator[None]:
    """Hold a lock file; the operating system releases the lock of a killed process.

    Args:
        file: Lock file; its folder is created.
        busy: Error message if another process holds the lock.
        timeout: Seconds to wait for the lock.
        reentrant: The thread that holds the lock may take it again.
        error: Class of the error if another process holds the lock.

    Raises:
        ConfigError: Or `error`, if another process or thread still holds the lock after `timeout`.
        ReadOnlyError: If the folder cannot be written.
        StorageError: If its file system does not support locks.
    """
    from filelock import FileLock, Timeout

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        # one object for each path makes the lock re-entrant
        lock = FileLock(str(file.resolve()), is_singleton=reentrant)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise error(busy) from None
        except NotImplementedError:
            raise StorageError(
                f"Cannot lock {file}: the file system has no locks, so two processes could write at once. Choose a "
                "folder on a local disk, or mount the network folder with locks."
            ) from None
    try:
        yield
    finally:
        lock.release()
