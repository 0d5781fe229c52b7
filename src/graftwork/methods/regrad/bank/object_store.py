"""Storage backend for object stores, with a lease-based writer lock."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from random import uniform
from typing import Any, cast
from uuid import uuid4

from graftwork.core.files import to_json
from graftwork.core.native import panics_as_errors
from graftwork.core.readers import parse_json
from graftwork.core.systems import is_alive
from graftwork.errors import ConfigError, MissingExtraError
from graftwork.methods.regrad.bank.backends import LOCK_FILE, WAIT, Backend, by_whom, first_line, this_writer
from graftwork.methods.regrad.bank.errors import BankLockedError, BankUnreachableError

SCHEMES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
"""URL scheme to obstore class."""
RENEW_SECONDS = 5.0
"""Interval at which a lock holder renews its lease."""
EXPIRE_SECONDS = 30.0
"""Age after which an unrenewed lease expires and another writer may take it over."""
RETRIES, RETRY_SECONDS = 3, 30
"""Number of retries of a transient failure, and the total time limit in seconds."""
_REFUSED = "lacked the necessary privileges"
"""Part of Lance's message for a denied write; Lance passes the store's error on as text only."""
_released_tokens: set[str] = set()
"""Tokens of leases that this process released while the store was unreachable."""
_NAME = re.compile(r"([\w.-]+)/([\w.=+-]+(?:/[\w.=+-]+)*)/?", re.ASCII)


class ObjectStoreBackend(Backend):
    """A key prefix in a bucket.

    Endpoint, region and credentials come from the environment variables that Lance also reads (AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME …).

    Args:
        scheme: s3, gs or az.
        name: Bucket and key prefix.
        renew_seconds: Interval at which a writer renews its lease.
        expire_seconds: Age after which an unrenewed lease expires.

    Raises:
        ConfigError: If the name is invalid.
        BankUnreachableError: If a required environment variable is missing.
        MissingExtraError: If obstore is not installed.
    """

    tag_lifetime = timedelta(days=7)

    def __init__(
        self, scheme: str, name: str, renew_seconds: float = RENEW_SECONDS, expire_seconds: float = EXPIRE_SECONDS
    ) -> None:
        # other characters would be escaped in the URL that Lance reads but not in the key
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
        with self._requests():
            self.store: Any = getattr(store, SCHEMES[scheme])(self._bucket, prefix=self._prefix, retry_config=retries)
        self._lock: StoreLock | None = None

    def __str__(self) -> str:
        return f"{self._scheme}://{self._bucket}/{self._prefix}"

    def uri(self, name: str) -> str:
        """Return the URL of a dataset."""
        return f"{self}/{name}"

    def exists(self, name: str) -> bool:
        """Return True if an object has this name, or this name as a key prefix."""
        with self._requests():
            with suppress(FileNotFoundError):
                self._obstore.head(self.store, name)
                return True
            # listing also distinguishes a missing bucket from an empty one
            return any(self._obstore.list(self.store, name))

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""
        with self._requests():
            try:
                return bytes(self._obstore.get(self.store, name).bytes())
            except FileNotFoundError:
                return None

    def write_json(self, name: str, value: Any) -> None:
        """Replace an object; stores do this atomically."""
        with self._requests():
            self._obstore.put(self.store, name, to_json(value, indent=2).encode())

    def size(self) -> int:
        """Return the total size of all objects in bytes."""
        with self._requests():
            return sum(one["size"] for part in self._obstore.list(self.store) for one in part)

    def contents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the name of every object, and its content in chunks."""
        with self._requests():
            names = sorted(one["path"] for part in self._obstore.list(self.store) for one in part)
        for name in names:
            with self._requests():
                yield name, map(bytes, self._obstore.get(self.store, name))

    def prepare(self) -> None:
        """Verify that the store supports conditional writes, which the lock and Lance's commits depend on.

        Raises:
            ConfigError: If it overwrites an existing object despite If-None-Match.
        """
        with self._requests():
            for _ in range(2):
                try:
                    self._obstore.put(self.store, LOCK_FILE, b"{}", mode="create")
                except self._obstore.exceptions.AlreadyExistsError:
                    return
        raise ConfigError(
            f"{self} is in a store that ignores conditional writes (If-None-Match). Two writers would damage a bank "
            "there. Use a newer version of the store, or another one."
        )

    def sync(self) -> None:
        """Do nothing: acknowledged writes are durable."""

    @contextmanager
    def write_lock(self, timeout: float) -> Generator[None]:
        """Hold the writer lease; the lease of a killed writer expires. See `Backend`.

        Raises:
            BankLockedError: If the wait exceeds `timeout`; names the lock holder and the age of its lock.
            BankUnreachableError: If the store does not respond.
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
        """Renew the lease.

        Raises:
            BankLockedError: If another writer took it over.
        """
        if self._lock is not None:
            self._lock.check()

    def check(self) -> None:
        """Send a request.

        Raises:
            BankUnreachableError: If the store does not respond.
        """
        self.exists(LOCK_FILE)

    def is_write_refusal(self, error: OSError) -> bool:
        """Return True if Lance reports a denied write."""
        return _REFUSED in str(error)

    def child(self, name: str) -> ObjectStoreBackend:
        """Return the backend of a longer key prefix, one level down."""
        return ObjectStoreBackend(self._scheme, f"{self._bucket}/{self._prefix}/{name}", *self._seconds)

    def sibling(self, suffix: str) -> ObjectStoreBackend:
        """Return the backend of the key prefix with this suffix appended."""
        return ObjectStoreBackend(self._scheme, f"{self._bucket}/{self._prefix}{suffix}", *self._seconds)

    def children(self) -> list[Backend]:
        """Return the backends of all key prefixes one level down, sorted."""
        with self._requests():
            found = self._obstore.list_with_delimiter(self.store)["common_prefixes"]
        return [self.child(Path(path).name) for path in sorted(found)]

    def remove(self) -> None:
        """Remove all objects with this key prefix."""
        with self._requests():
            for names in [[one["path"] for one in part] for part in self._obstore.list(self.store)]:
                self._obstore.delete(self.store, names)

    def load(self, name: str) -> tuple[bytes, dict[str, str]] | None:
        """Return content and version of an object, or None if it does not exist."""
        with self._requests():
            try:
                found = self._obstore.get(self.store, name)
                return bytes(found.bytes()), _version(found.meta)
            except FileNotFoundError:
                return None

    def replace(self, name: str, content: bytes, version: Mapping[str, str] | None) -> dict[str, str] | None:
        """Write an object if its current version matches (compare-and-swap).

        Args:
            name: Name of the object.
            content: New content.
            version: Expected version; None expects that the object does not exist.

        Returns:
            The new version, or None if the expectation failed.

        Raises:
            BankUnreachableError: If the store does not respond, or does not support conditional writes.
        """
        mode: Any = "create" if version is None else dict(version)
        refused = (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError)
        with self._requests():
            try:
                return _version(self._obstore.put(self.store, name, content, mode=mode))
            except refused:
                return None

    @contextmanager
    def _requests(self) -> Generator[None]:
        try:
            with panics_as_errors(str(self)):
                yield
        except (self._obstore.exceptions.BaseError, OSError) as error:
            message = first_line(error)
            # the only hint at a rejected unencrypted endpoint
            plain = " An address with http:// needs AWS_ALLOW_HTTP=true." if message.endswith("builder error") else ""
            raise BankUnreachableError(
                f"{self} cannot be reached: {message}. Check the bucket, and its address, region and credentials in "
                f"the environment.{plain}"
            ) from error


class StoreLock:
    """Writer lease stored as an object.

    The object is created once and then only replaced by compare-and-swap, so of two competing writers exactly one
    succeeds. A waiting writer watches for renewals and measures their age by its own clock, since clocks of machines
    differ.

    Args:
        backend: Backend of the bank.
        renew_seconds: Interval at which the holder renews the lease.
        expire_seconds: Age after which an unrenewed lease may be taken over.
    """

    def __init__(self, backend: ObjectStoreBackend, renew_seconds: float, expire_seconds: float) -> None:
        self._backend, self._renew_seconds, self._expire_seconds = backend, renew_seconds, expire_seconds
        self._token = uuid4().hex
        self._entry = {**this_writer(), "machine": _machine(), "token": self._token}
        self._count = 0
        self._version: dict[str, str] | None = None
        self._guard, self._released = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="graftwork-bank-lock", daemon=True)

    def acquire(self, timeout: float) -> None:
        """Acquire the lease.

        Raises:
            BankLockedError: If another writer holds it for longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        last: tuple[Any, float] = (None, 0.0)
        wait = 0.05
        while True:
            owner, version = self._read()
            if version != last[0]:
                last = (version, time.monotonic())
            unrenewed = time.monotonic() - last[1]
            free = version is None or owner.get("token") is None or _dead(owner) or unrenewed >= self._expire_seconds
            if free and self._write(version):
                self._thread.start()
                return
            if time.monotonic() >= deadline:
                raise BankLockedError(f"{self._backend} is being written to {by_whom(owner)}. {WAIT}")
            time.sleep(min(uniform(wait / 2, wait), max(0.0, deadline - time.monotonic())))
            wait = min(2 * wait, 1.0)

    def check(self) -> None:
        """Renew the lease.

        Raises:
            BankLockedError: If another writer holds it.
        """
        with self._guard:
            if self._version is None or not self._write(self._version):
                raise BankLockedError(
                    f"{self._backend} was taken over by another writer, because this one did not renew its lock for "
                    f"more than {self._expire_seconds:g} s. Acknowledged batches are kept; repeat the others."
                )

    def release(self) -> None:
        """Release the lease, unless another writer has taken it over."""
        self._released.set()
        self._thread.join()
        # while the store is unreachable the lease can only expire; writers of this process need not wait for that
        _released_tokens.add(self._token)
        with self._guard, suppress(BankUnreachableError):
            if self._version is not None:
                self._backend.replace(LOCK_FILE, json.dumps({"last": self._entry}).encode(), self._version)
                _released_tokens.discard(self._token)

    def _renew(self) -> None:
        while not self._released.wait(self._renew_seconds):
            # the store may be reachable at the next renewal; commits check the lease themselves
            with suppress(BankUnreachableError, BankLockedError):
                self.check()

    def _read(self) -> tuple[dict[str, Any], dict[str, str] | None]:
        found = self._backend.load(LOCK_FILE)
        if found is None:
            return {}, None
        try:
            owner: Any = parse_json(found[0], any_text=True)
        except ValueError:
            owner = None
        # an unreadable lease counts as held until it expires
        return cast("dict[str, Any]", owner) if isinstance(owner, dict) else {"token": "unknown"}, found[1]

    def _write(self, version: Mapping[str, str] | None) -> bool:
        """Replace this version with a renewed lease; return False if another writer replaced it first."""
        self._count += 1
        content = json.dumps({**self._entry, "renewed": self._count}).encode()
        self._version = self._backend.replace(LOCK_FILE, content, version)
        if self._version is None:
            # a retried request whose first response was lost fails because of its own success
            owner, current = self._read()
            self._version = current if owner.get("token") == self._token else None
        return self._version is not None


def _version(meta: Any) -> dict[str, str]:
    """Version identifier of an object: an ETag in S3 and Azure, a generation number in Google's store."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _dead(owner: Mapping[str, Any]) -> bool:
    """True if the lock holder is known to be dead; remote holders are detected by lease expiry only."""
    if owner.get("token") in _released_tokens:
        return True
    here = owner.get("machine") is not None and owner.get("machine") == _machine()
    return here and isinstance(owner.get("process"), int) and not is_alive(owner["process"])


def _machine() -> str | None:
    """Scope in which process ids are unique: boot id and pid namespace; None where they are unavailable."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
