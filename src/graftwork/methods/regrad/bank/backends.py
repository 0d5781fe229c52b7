"""Where a bank is kept: a folder, or a name in an object store."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from graftwork.core.files import write_json
from graftwork.methods.regrad.bank.errors import BankLockedError

LOCK_FILE = "writer.lock"
_OWNER_FILE = "writer.json"


class Backend(ABC):
    """What a bank needs of the backend that it is kept in. Printed, it says where that is."""

    options: Mapping[str, str] | None = None
    """What Lance is told about getting there."""
    tag_lifetime: timedelta | None = None
    """When the mark of a reader elsewhere is taken for a dead one's; None where nobody can tell."""

    @abstractmethod
    def uri(self, name: str) -> str:
        """What Lance opens as the dataset of this name."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """What is in a file; None if there is no such file."""

    @abstractmethod
    def write_json(self, name: str, value: Any) -> None:
        """Write a file that a reader, a kill and a loss of power find old or new, never half."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of all files."""

    @abstractmethod
    def prepare(self) -> None:
        """Get ready for a new bank.

        Raises:
            ConfigError: If no bank can be kept here.
        """

    @abstractmethod
    def sync(self) -> None:
        """Have every file that came since the last call kept through a loss of power."""

    @abstractmethod
    def write_lock(self, timeout: float) -> AbstractContextManager[None]:
        """Be the only writer.

        Raises:
            BankLockedError: If another writer keeps it for longer; says who and since when.
        """

    @abstractmethod
    def check_lock(self) -> None:
        """Make sure of still being the only writer.

        Raises:
            BankLockedError: If another writer took over.
        """

    @abstractmethod
    def check(self) -> None:
        """Tell a backend that is out of reach from files that are damaged.

        Raises:
            BankUnreachableError: If the backend does not answer.
        """

    @abstractmethod
    def is_write_refusal(self, error: OSError) -> bool:
        """Whether this error says that nothing can be written here."""

    @abstractmethod
    def child(self, name: str) -> Backend:
        """A backend in this one."""

    @abstractmethod
    def sibling(self, ending: str) -> Backend:
        """The backend whose name has this ending more."""

    @abstractmethod
    def children(self) -> list[Backend]:
        """The places in this one, sorted; none if it is not there."""

    @abstractmethod
    def remove(self) -> None:
        """Remove everything in it."""


class LocalBackend(Backend):
    """A folder of a file system.

    Args:
        folder: Where; need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._synced: set[str] = set()

    def __str__(self) -> str:
        return str(self.folder)

    def uri(self, name: str) -> str:
        """The path of a dataset."""
        return str(self.folder / name)

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""
        return (self.folder / name).exists()

    def read(self, name: str) -> bytes | None:
        """What is in a file; None if there is no such file."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a file and have the disk keep it."""
        write_json(self.folder / name, value)
        _sync(self.folder)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def prepare(self) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def sync(self) -> None:
        """Have the disk keep every file that came since the last call; Lance itself never asks for that."""
        there: set[str] = set()
        for root, _, names in os.walk(self.folder):
            fresh = False
            for name in names:
                path = os.path.join(root, name)
                # the one file that is written again
                if path in self._synced and not name.startswith("latest_version_hint"):
                    there.add(path)
                    continue
                try:
                    _sync(path)
                except FileNotFoundError:  # a reader took its mark away
                    continue
                fresh = True
                there.add(path)
            if fresh:
                _sync(root)
        self._synced = there

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        """Be the only writer; a killed writer's lock is free at once, because the system holds it.

        Raises:
            BankLockedError: If another writer keeps it for longer; says who and since when.
        """
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
        """Nobody takes a lock over that the system holds."""

    def check(self) -> None:
        """A folder is always within reach."""

    def is_write_refusal(self, error: OSError) -> bool:
        """Whether this error says that nothing can be written here."""
        return isinstance(error, PermissionError)

    def child(self, name: str) -> LocalBackend:
        """A folder in this one."""
        return LocalBackend(self.folder / name)

    def sibling(self, ending: str) -> LocalBackend:
        """The folder whose name has this ending more."""
        return LocalBackend(self.folder.with_name(f"{self.folder.name}{ending}"))

    def children(self) -> list[Backend]:
        """The folders in this one, sorted."""
        if not self.folder.is_dir():
            return []
        return [LocalBackend(path) for path in sorted(self.folder.iterdir()) if path.is_dir()]

    def remove(self) -> None:
        """Remove the folder."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _owner(self) -> Any:
        try:
            return json.loads((self.folder / _OWNER_FILE).read_text())
        except (OSError, ValueError):
            return None


WAIT = "Wait for it, or stop it."


def this_writer() -> dict[str, Any]:
    """What others are told about who writes."""
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}


def by_whom(owner: Any) -> str:
    """Who writes, and for how long, as far as that is known."""
    try:
        age = time.time() - owner["since"]
        return f"by process {owner['process']} on {owner['host']}, for {age:.0f} s"
    except (TypeError, KeyError):
        return "by another process"


def alive(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
