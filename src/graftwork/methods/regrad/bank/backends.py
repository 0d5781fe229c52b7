"""Storage backends of banks: the interface, and the local folder."""

from __future__ import annotations

import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from graftwork.core.files import write_json
from graftwork.core.readers import parse_json
from graftwork.core.storage import writing
from graftwork.core.systems import sync_file
from graftwork.methods.regrad.bank.errors import BankLockedError

LOCK_FILE = "writer.lock"
_OWNER_FILE = "writer.json"


class Backend(ABC):
    """Storage of one bank: files, a writer lock, and URIs for Lance. `str(backend)` is its location."""

    options: Mapping[str, str] | None = None
    """Storage options passed to Lance."""
    tag_lifetime: timedelta | None = None
    """Age after which a reader's tag counts as stale; None if tags never expire."""

    @abstractmethod
    def uri(self, name: str) -> str:
        """Return the URI that Lance opens for a dataset."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return True if a file or folder has this name."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""

    @abstractmethod
    def write_json(self, name: str, value: Any) -> None:
        """Replace a file atomically and durably: readers, a kill and a power loss see the old or the new content."""

    @abstractmethod
    def size(self) -> int:
        """Return the total size of all files in bytes."""

    @abstractmethod
    def contents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the name of every file, and its content in chunks."""

    @abstractmethod
    def prepare(self) -> None:
        """Prepare the location for a new bank.

        Raises:
            ConfigError: If the backend cannot store a bank safely.
        """

    @abstractmethod
    def sync(self) -> None:
        """Make all files written since the last call durable."""

    @abstractmethod
    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Hold the exclusive writer lock inside the context.

        Args:
            timeout: Longest wait for another writer, in seconds.

        Raises:
            BankLockedError: If the wait exceeds `timeout`; names the lock holder and the age of its lock.
        """

    @abstractmethod
    def check_lock(self) -> None:
        """Verify that this writer still holds the lock.

        Raises:
            BankLockedError: If another writer took it over.
        """

    @abstractmethod
    def check(self) -> None:
        """Verify that the backend is reachable, to distinguish outages from damaged files.

        Raises:
            BankUnreachableError: If it does not respond.
        """

    @abstractmethod
    def is_write_refusal(self, error: OSError) -> bool:
        """Return True if an error means that the location is read-only."""

    @abstractmethod
    def child(self, name: str) -> Backend:
        """Return the backend of a subfolder."""

    @abstractmethod
    def sibling(self, suffix: str) -> Backend:
        """Return the backend of the location with this suffix appended to its name."""

    @abstractmethod
    def children(self) -> list[Backend]:
        """Return the backends of all subfolders, sorted; empty if the location does not exist."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the location with all its content."""


class LocalBackend(Backend):
    """A folder of a file system.

    Args:
        folder: Path of the folder; may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._synced: set[str] = set()

    def __str__(self) -> str:
        return str(self.folder)

    def uri(self, name: str) -> str:
        """Return the path of a dataset."""
        return str(self.folder / name)

    def exists(self, name: str) -> bool:
        """Return True if a file or folder has this name."""
        return (self.folder / name).exists()

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file atomically and sync its folder."""
        write_json(self.folder / name, value)
        sync_file(self.folder)

    def size(self) -> int:
        """Return the total size of all files in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def contents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the path of every file in the folder, and its content in chunks."""
        return file_contents(self.folder)

    def prepare(self) -> None:
        """Create the folder."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def sync(self) -> None:
        """Call fsync on every file and folder that is new since the last call; Lance itself never does.

        The calls run side by side: file systems put what is synced at once into one write of their journal.
        """
        synced: set[str] = set()
        fresh: list[str] = []
        folders: list[str] = []
        for root, _, names in os.walk(self.folder):
            # only the version hint is overwritten in place
            paths = [os.path.join(root, name) for name in names]
            new = [
                path
                for path, name in zip(paths, names, strict=True)
                if path not in self._synced or name.startswith("latest_version_hint")
            ]
            synced.update(paths)
            fresh += new
            folders += [root] if new else []
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            gone = {path for path, found in zip(fresh, pool.map(_sync_if_there, fresh), strict=True) if not found}
            # the folders after their files
            list(pool.map(sync_file, folders))
        self._synced = synced - gone

    @contextmanager
    def write_lock(self, timeout: float) -> Generator[None]:
        """Hold an operating-system file lock, which is released at once when its process dies. See `Backend`."""
        from filelock import FileLock, Timeout

        lock = FileLock(str(self.folder / LOCK_FILE))
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise BankLockedError(f"{self} is being written to {by_whom(self._owner())}. {WAIT}") from None
        try:
            write_json(self.folder / _OWNER_FILE, this_writer())
            yield
        finally:
            lock.release()

    def check_lock(self) -> None:
        """Do nothing: an operating-system lock cannot be taken over."""

    def check(self) -> None:
        """Do nothing: a folder counts as reachable."""

    def is_write_refusal(self, error: OSError) -> bool:
        """Return True for permission errors, which Lance raises as plain OSError."""
        return isinstance(error, PermissionError) or not os.access(self.folder, os.W_OK) or "os error 13" in str(error)

    def child(self, name: str) -> LocalBackend:
        """Return the backend of a subfolder."""
        return LocalBackend(self.folder / name)

    def sibling(self, suffix: str) -> LocalBackend:
        """Return the backend of the folder with this suffix appended to its name."""
        return LocalBackend(self.folder.with_name(f"{self.folder.name}{suffix}"))

    def children(self) -> list[Backend]:
        """Return the backends of all subfolders, sorted."""
        if not self.folder.is_dir():
            return []
        return [LocalBackend(path) for path in sorted(self.folder.iterdir()) if path.is_dir()]

    def remove(self) -> None:
        """Remove the folder."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _owner(self) -> Any:
        try:
            return parse_json((self.folder / _OWNER_FILE).read_bytes(), any_text=True)
        except (OSError, ValueError):
            return None


_SYNCS_AT_ONCE = 8
_CHUNK = 8 << 20
WAIT = "Wait for it, or stop it."
"""Advice that ends the message of a `BankLockedError`."""


def file_contents(folder: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the path of every file below a folder, and its content in chunks; nothing for a folder that is absent."""
    # os.walk ignores folders that another process removes
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in sorted(names)):
            if path.is_file() and not path.is_symlink():
                yield str(path), _chunks(path)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except FileNotFoundError:  # the tag of a reader, for example
        return


def this_writer() -> dict[str, Any]:
    """Return this process's entry in the lock: host, process id, start time."""
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}


def by_whom(owner: Any) -> str:
    """Describe a lock holder for a message, as far as its entry is readable."""
    try:
        age = time.time() - owner["since"]
        return f"by process {owner['process']} on {owner['host']}, for {age:.0f} s"
    except (TypeError, KeyError):
        return "by another process"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, shortened for a one-line message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _sync_if_there(path: str) -> bool:
    """Sync a file; False if it has been removed, as a reader's tag."""
    try:
        sync_file(path)
    except FileNotFoundError:
        return False
    return True
