"""A bank in an object store: files by address, and a lock that no system holds but its writer renews."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from random import uniform
from typing import Any
from uuid import uuid4

from graftwork.errors import ConfigError, MissingExtraError
from graftwork.methods.regrad.bank.backends import LOCK_FILE, WAIT, Backend, alive, by_whom, first_line, this_writer
from graftwork.methods.regrad.bank.errors import BankLockedError, BankUnreachableError

SCHEMES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
"""Beginning of an address, and the class of obstore for it."""
RENEW_SECONDS = 5.0
EXPIRE_SECONDS = 30.0
"""A lock that was not renewed for so long may be taken over."""
RETRIES, RETRY_SECONDS = 3, 30
"""How often, and up to when, a request is repeated that failed through no fault of its own."""
_REFUSED = "lacked the necessary privileges"
"""What Lance says where only reading is granted: it hands its store's error on as a text."""
_left: set[str] = set()
"""What this process let go of without being able to say so."""
_NAME = re.compile(r"([\w.-]+)/([\w.=+-]+(?:/[\w.=+-]+)*)/?", re.ASCII)


class ObjectStoreBackend(Backend):
    """A name in a bucket; everything of the bank begins with it.

    Address, region and credentials come from the environment, by the names that Lance reads too (AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME …).

    Args:
        scheme: s3, gs or az.
        name: Bucket and name in it.
        renew_seconds: How often a writer says that it is still there.
        expire_seconds: After what silence it may be taken for dead.

    Raises:
        ConfigError: If the name is none, or something in the environment is missing.
        MissingExtraError: If obstore is not installed.
    """

    tag_lifetime = timedelta(days=7)

    def __init__(
        self, scheme: str, name: str, renew_seconds: float = RENEW_SECONDS, expire_seconds: float = EXPIRE_SECONDS
    ) -> None:
        # other letters would be one thing in an address, which Lance takes, and another in a key
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise ConfigError(
                f"Found {scheme}://{name} for a bank; expected a bucket and a name of letters, digits and . _ = + - /, "
                f"such as {scheme}://bucket/bank."
            )
        try:
            import obstore
            from obstore import store
        except ImportError:
            raise MissingExtraError("obstore", "regrad") from None
        self._scheme, self._bucket, self._prefix = scheme, parts[1], parts[2]
        self._obstore, self._seconds = obstore, (renew_seconds, expire_seconds)
        self.options = {"client_max_retries": str(RETRIES), "client_retry_timeout": str(RETRY_SECONDS)}
        retries: Any = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
        with self._answering():
            self._store = getattr(store, SCHEMES[scheme])(self._bucket, prefix=self._prefix, retry_config=retries)
        self._lock: StoreLock | None = None

    def __str__(self) -> str:
        return f"{self._scheme}://{self._bucket}/{self._prefix}"

    def uri(self, name: str) -> str:
        """The address of a dataset."""
        return f"{self}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name, or one whose name begins with it."""
        with self._answering():
            with suppress(FileNotFoundError):
                self._obstore.head(self._store, name)
                return True
            # also what tells a bucket that is not there from an empty one
            return any(self._obstore.list(self._store, name))

    def read(self, name: str) -> bytes | None:
        """What is in an object; None if there is none."""
        with self._answering():
            try:
                return bytes(self._obstore.get(self._store, name).bytes())
            except FileNotFoundError:
                return None

    def write_json(self, name: str, value: Any) -> None:
        """Write an object, which readers see at once and whole."""
        with self._answering():
            self._obstore.put(self._store, name, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def size(self) -> int:
        """Bytes of all objects."""
        with self._answering():
            return sum(one["size"] for part in self._obstore.list(self._store) for one in part)

    def prepare(self) -> None:
        """Try out whether the store refuses what the lock and Lance's commits need refused.

        Raises:
            ConfigError: If it does not.
        """
        with self._answering():
            for _ in range(2):
                try:
                    self._obstore.put(self._store, LOCK_FILE, b"{}", mode="create")
                except self._obstore.exceptions.AlreadyExistsError:
                    return
        raise ConfigError(
            f"{self} is in a store that writes over an object although it was told not to (If-None-Match). Two writers "
            "would harm a bank there. Take a newer version of the store, or another one."
        )

    def sync(self) -> None:
        """What a store has acknowledged is kept."""

    @contextmanager
    def write_lock(self, timeout: float) -> Iterator[None]:
        """Be the only writer; a killed writer's lock is free once it was not renewed for a while.

        Raises:
            BankLockedError: If another writer keeps it for longer; says who and since when.
            BankUnreachableError: If the store does not answer.
        """
        lock = StoreLock(self, *self._seconds)
        lock.acquire(timeout)
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def check_lock(self) -> None:
        """Renew the lock.

        Raises:
            BankLockedError: If another writer took it over.
        """
        if self._lock is not None:
            self._lock.check()

    def check(self) -> None:
        """Ask for something.

        Raises:
            BankUnreachableError: If no answer comes.
        """
        self.exists(LOCK_FILE)

    def is_write_refusal(self, error: OSError) -> bool:
        """Whether the store grants reading alone, as Lance hands that on."""
        return _REFUSED in str(error)

    def child(self, name: str) -> ObjectStoreBackend:
        """A name that begins with this one."""
        return ObjectStoreBackend(self._scheme, f"{self._bucket}/{self._prefix}/{name}", *self._seconds)

    def sibling(self, ending: str) -> ObjectStoreBackend:
        """The name that has this ending more."""
        return ObjectStoreBackend(self._scheme, f"{self._bucket}/{self._prefix}{ending}", *self._seconds)

    def children(self) -> list[Backend]:
        """What stands before the next slash in names that begin with this one."""
        with self._answering():
            found = self._obstore.list_with_delimiter(self._store)["common_prefixes"]
        return [self.child(Path(path).name) for path in sorted(found)]

    def remove(self) -> None:
        """Remove every object whose name begins with this one."""
        with self._answering():
            for names in [[one["path"] for one in part] for part in self._obstore.list(self._store)]:
                self._obstore.delete(self._store, names)

    def load(self, name: str) -> tuple[bytes, dict[str, str]] | None:
        """What is in an object, and which version of it that is."""
        with self._answering():
            try:
                found = self._obstore.get(self._store, name)
                return bytes(found.bytes()), _version(found.meta)
            except FileNotFoundError:
                return None

    def replace(self, name: str, content: bytes, version: Mapping[str, str] | None) -> dict[str, str] | None:
        """Write an object if it is still of this version, or not there (None); the new version, or None if it was not.

        Raises:
            BankUnreachableError: If the store does not answer, or knows no such writing.
        """
        mode: Any = "create" if version is None else dict(version)
        refused = (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError)
        with self._answering():
            try:
                return _version(self._obstore.put(self._store, name, content, mode=mode))
            except refused:
                return None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (self._obstore.exceptions.BaseError, OSError) as error:
            said = first_line(error)
            # all that is said of an address without encryption
            plain = " An address with http:// needs AWS_ALLOW_HTTP=true." if said.endswith("builder error") else ""
            raise BankUnreachableError(
                f"{self} cannot be reached: {said}. Check the bucket, and its address, region and credentials in the "
                f"environment.{plain}"
            ) from error


class StoreLock:
    """An object that one writer at a time holds.

    It is made once, then only ever replaced, and only in the version that was last seen; so of two writers that want it
    one gets it. Whoever waits looks whether it changes, by its own clock: clocks of machines differ.

    Args:
        backend: The bank's.
        renew_seconds: How often its holder writes it again.
        expire_seconds: After what silence somebody else may.
    """

    def __init__(self, backend: ObjectStoreBackend, renew_seconds: float, expire_seconds: float) -> None:
        self._backend, self._renew_seconds, self._expire_seconds = backend, renew_seconds, expire_seconds
        self._about = {**this_writer(), "machine": _machine(), "token": uuid4().hex}
        self._count = 0
        self._version: dict[str, str] | None = None
        self._guard, self._released = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="graftwork-bank-lock", daemon=True)

    def acquire(self, timeout: float) -> None:
        """Hold it.

        Raises:
            BankLockedError: If somebody else does for longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        last: tuple[Any, float] = (None, 0.0)
        wait = 0.05
        while True:
            owner, version = self._look()
            if version != last[0]:
                last = (version, time.monotonic())
            silent = time.monotonic() - last[1]
            free = version is None or owner.get("token") is None or _dead(owner) or silent >= self._expire_seconds
            if free and self._write(version):
                self._thread.start()
                return
            if time.monotonic() >= deadline:
                raise BankLockedError(f"{self._backend} is being written to {by_whom(owner)}. {WAIT}")
            time.sleep(min(uniform(wait / 2, wait), max(0.0, deadline - time.monotonic())))
            wait = min(2 * wait, 1.0)

    def check(self) -> None:
        """Renew it.

        Raises:
            BankLockedError: If somebody else holds it.
        """
        with self._guard:
            if self._version is None or not self._write(self._version):
                raise BankLockedError(
                    f"{self._backend} was taken over by another writer, because this one stood still for more than "
                    f"{self._expire_seconds:g} s. What was acknowledged is kept; do the rest again."
                )

    def release(self) -> None:
        """Let go of it; what somebody else holds by now stays."""
        self._released.set()
        self._thread.join()
        # where the store is out of reach it expires; this process need not wait for that
        _left.add(self._about["token"])
        with self._guard, suppress(BankUnreachableError):
            if self._version is not None:
                self._backend.replace(LOCK_FILE, json.dumps({"last": self._about}).encode(), self._version)
                _left.discard(self._about["token"])

    def _keep(self) -> None:
        while not self._released.wait(self._renew_seconds):
            # the next time may find the store again, and whoever commits asks by itself
            with suppress(BankUnreachableError, BankLockedError):
                self.check()

    def _look(self) -> tuple[dict[str, Any], dict[str, str] | None]:
        found = self._backend.load(LOCK_FILE)
        if found is None:
            return {}, None
        try:
            owner = json.loads(found[0])
        except ValueError:
            owner = None
        # something unreadable is somebody's until it has stood still for long enough
        return owner if isinstance(owner, dict) else {"token": "unknown"}, found[1]

    def _write(self, version: Mapping[str, str] | None) -> bool:
        """Write it as mine over this version of it; False, and no more mine, if somebody else did."""
        self._count += 1
        content = json.dumps({**self._about, "renewed": self._count}).encode()
        self._version = self._backend.replace(LOCK_FILE, content, version)
        if self._version is None:
            # a request that was repeated because its answer was lost is refused for what it did itself
            owner, there = self._look()
            self._version = there if owner.get("token") == self._about["token"] else None
        return self._version is not None


def _version(about: Any) -> dict[str, str]:
    """By what a store knows a version of an object: S3 and Azure by a tag, Google by a number."""
    return {name: about[name] for name in ("e_tag", "version") if about.get(name) is not None}


def _dead(owner: Mapping[str, Any]) -> bool:
    """Whether the holder certainly writes no more; for holders elsewhere only silence tells."""
    if owner.get("token") in _left:
        return True
    here = owner.get("machine") is not None and owner.get("machine") == _machine()
    return here and isinstance(owner.get("process"), int) and not alive(owner["process"])


def _machine() -> str | None:
    """What tells processes by their numbers: this start of this machine, and its container; None where none says so."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
