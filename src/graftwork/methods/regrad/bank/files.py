"""Files of a bank: manifest, commit record, the two Lance datasets, and the tags of readers."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from graftwork.core.files import to_json
from graftwork.core.native import is_panic
from graftwork.core.readers import parse_json
from graftwork.core.storage import disk_error
from graftwork.core.systems import is_alive
from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.methods.regrad.bank.backends import Backend, first_line
from graftwork.methods.regrad.bank.errors import BankCorruptionError
from graftwork.methods.regrad.bank.layout import Layout, Precision, check_precision, stride
from graftwork.methods.regrad.bank.opening import backend_for

MANIFEST_FILE = "bank.json"
COMMIT_FILE = "seal.json"
RECORDS = "records.lance"
IDS = "ids.lance"
RECORD, GRADIENT, TRAINED_ADAPTER = "record", "gradient", "trained adapter"
"""Fingerprint entry for the kind of records, and its values; a bank without this entry contains gradients."""
TRAINING_FIELDS = (RECORD, "training", "question wording")
"""Fingerprint entries that only banks of trained adapters have."""
BASE, TYPE, ROUNDED = "base weights", "type of the base weights", "base weights in bfloat16"
"""Fingerprint entries for the base weights: digest in the type of the checkpoint, that type, and digest after rounding.
Banks of earlier versions have the first only."""
_MODULUS = 1 << 128
_KEYS_AT_ONCE = 500


@dataclass(frozen=True)
class Manifest:
    """Immutable description of a bank."""

    fingerprint: Mapping[str, str]
    """Name to value of everything that the gradients depend on."""
    layout: Layout
    precision: Precision
    recorded: Mapping[str, Any]
    """State at creation that may change without invalidating gradients, such as the step sizes."""

    @property
    def record(self) -> str:
        """Kind of the records: gradients or trained adapters."""
        return self.fingerprint.get(RECORD, GRADIENT)

    @property
    def stride(self) -> int:
        """Number of bytes of one encoded gradient."""
        return stride(self.layout.size, self.precision)

    def write(self, backend: Backend) -> None:
        """Write `bank.json` with its digest."""
        value = {
            "schema": 1,
            "fingerprint": dict(self.fingerprint),
            "layout": self.layout.plain(),
            "precision": self.precision,
            "recorded": dict(self.recorded),
        }
        write_signed(backend, MANIFEST_FILE, value)

    @classmethod
    def read(cls, backend: Backend) -> Manifest:
        """Read `bank.json`.

        Raises:
            ConfigError: If the location contains no bank.
            BankCorruptionError: If the file does not match its digest.
            BankUnreachableError: If the backend does not respond.
        """
        value = _read_signed(backend, MANIFEST_FILE)
        if value is None:
            if backend.exists(RECORDS):
                raise BankCorruptionError(f"{backend} holds gradients but no {MANIFEST_FILE}. Restore that file.")
            raise ConfigError(f"Found no gradient bank in {backend}; expected {MANIFEST_FILE}. Check the path.")
        layout = Layout.of((name, shape) for name, shape in value["layout"])
        return cls(value["fingerprint"], layout, check_precision(value["precision"]), value["recorded"])


@dataclass(frozen=True)
class CommitRecord:
    """Versions and counts of both datasets at the last acknowledged commit."""

    records_version: int
    ids_version: int
    records: int
    ids: int
    ids_digest: str

    def write(self, backend: Backend) -> None:
        """Write `seal.json` with its digest."""
        write_signed(backend, COMMIT_FILE, asdict(self))

    @classmethod
    def read(cls, backend: Backend) -> CommitRecord:
        """Read `seal.json`.

        Raises:
            BankCorruptionError: If it is missing or does not match its digest.
        """
        value = _read_signed(backend, COMMIT_FILE)
        if value is None:
            raise BankCorruptionError(f"{backend} has no {COMMIT_FILE}. Restore that file, or rebuild the bank.")
        return cls(**value)


def holds_bank(location: str | Path | Backend) -> bool:
    """Return True if the location contains a bank.

    Raises:
        ConfigError: If the location is a URL of an unsupported scheme.
        BankUnreachableError: If the backend does not respond.
    """
    return backend_for(location).exists(MANIFEST_FILE)


def check_no_bank(backend: Backend) -> None:
    """Verify that a new bank would not overwrite an existing one.

    Raises:
        ConfigError: If the location contains a bank.
    """
    if holds_bank(backend):
        raise ConfigError(f"Found a bank in {backend} already. Open it to add to it, or choose another folder.")


def row_digest(name: str, key: str) -> int:
    """128-bit digest of one row of the ids; digests are summed, so the total does not depend on row order."""
    return int.from_bytes(blake2b(f"{len(name)}:{name}{key}".encode(), digest_size=16).digest(), "little")


def add_digests(total: str, rows: Sequence[tuple[str, str]], sign: int = 1) -> str:
    """Update the digest of the ids after rows were added, or with sign −1 removed."""
    return f"{(int(total, 16) + sign * sum(row_digest(*row) for row in rows)) % _MODULUS:032x}"


def text_key(text: str) -> str:
    """Return the key of a text's record: a digest of the text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def lance_module() -> Any:
    """Import `lance`.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import lance
    except ImportError:
        raise MissingExtraError("pylance", "regrad") from None
    return lance


def arrow_table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    """Return an Arrow table of rows."""
    return _arrow().Table.from_pylist(list(rows), schema=schema)


@contextmanager
def reading(backend: Backend, *names: str) -> Generator[None]:
    """Convert the errors that Lance raises for broken files to `BankCorruptionError`.

    Args:
        backend: Backend of the bank; checked for an outage first.
        names: Objects being read, for the message; the whole bank by default.
    """
    what = ", ".join(names) or str(backend)
    try:
        yield
    except GraftworkError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        backend.check()
        raise disk_error(error, what) or BankCorruptionError(f"{what} cannot be read: {first_line(error)}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise BankCorruptionError(f"{what} cannot be read: {first_line(error)}") from error


def open_dataset(backend: Backend, name: str, version: int | None = None) -> Any:
    """Open a dataset at a version, or at the latest one."""
    lance = lance_module()
    uri = backend.uri(name)
    with reading(backend, uri):
        return lance.dataset(uri, version=version, storage_options=backend.options)


def create_datasets(backend: Backend, value_bytes: int) -> None:
    """Create both datasets without rows; empty datasets of an interrupted call are reused.

    Raises:
        BankCorruptionError: If a dataset already contains rows.
    """
    lance = lance_module()
    for name, schema in ((RECORDS, records_schema(value_bytes)), (IDS, ids_schema())):
        with reading(backend, backend.uri(name)), suppress(OSError, ValueError):
            if lance.dataset(backend.uri(name), storage_options=backend.options).count_rows():
                raise BankCorruptionError(f"{backend} holds gradients but no {MANIFEST_FILE}. Restore that file.")
            continue
        with reading(backend, backend.uri(name)):
            empty = arrow_table([], schema)
            lance.write_dataset(empty, backend.uri(name), mode="create", storage_options=backend.options)


def records_schema(value_bytes: int) -> Any:
    """Arrow schema of the records."""
    pa = _arrow()
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("value", pa.binary(value_bytes), nullable=False),
            pa.field("scale", pa.float64(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("loss", pa.float32(), nullable=False),
            pa.field("norm", pa.float32(), nullable=False),
            pa.field("truncated", pa.bool_(), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
        ]
    )


def ids_schema() -> Any:
    """Arrow schema of the ids, which map passages to record keys."""
    pa = _arrow()
    # with a primary key, Lance rejects the second of two concurrent inserts of an id
    primary = {b"lance-schema:unenforced-primary-key": b"true"}
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=primary),
            pa.field("key", pa.string(), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
        ]
    )


def rows_where(dataset: Any, column: str, values: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows whose column equals one of the values, in arbitrary order; missing values yield no row."""
    for condition in conditions(column, values):
        yield from dataset.to_table(columns=list(columns), filter=condition).to_pylist()


def conditions(column: str, values: Sequence[str]) -> Iterator[str]:
    """Yield SQL conditions that together select these values; several, because long conditions are slow in Lance."""
    for start in range(0, len(values), _KEYS_AT_ONCE):
        quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values[start : start + _KEYS_AT_ONCE])
        yield f"{column} IN ({quoted})"


def tag_versions(backend: Backend, datasets: Sequence[Any]) -> str | None:
    """Tag the versions that a reader has open, which protects them from clean-up.

    Returns:
        Name of the tag; None if the location is read-only.
    """
    name = f"reader-{_host()}-{os.getpid()}-{time.time_ns()}"
    try:
        for dataset in datasets:
            dataset.tags.create(name, dataset.version)
    except OSError as error:
        if not backend.is_write_refusal(error):
            raise
        return None
    return name


def untag_versions(datasets: Sequence[Any], name: str) -> None:
    """Remove a reader's tag; does nothing in a forked child, whose parent owns the tag."""
    if int(name.split("-")[-2]) != os.getpid():
        return
    # a tag that cannot be removed expires; this also runs at interpreter exit
    with suppress(OSError):
        for dataset in datasets:
            if name in dataset.tags.list():
                dataset.tags.delete(name)


def drop_stale_tags(dataset: Any, lifetime: timedelta | None = None) -> None:
    """Remove tags of dead processes of this machine, and all tags older than `lifetime`."""
    for name, about in dict(dataset.tags.list()).items():
        parts = name.split("-")
        if parts[0] != "reader":
            continue
        here = parts[1:-2] == [_host()]
        created = about.get("created_at")
        expired = lifetime is not None and created is not None and datetime.now(UTC) - created > lifetime
        if (here and not is_alive(int(parts[-2]))) or expired:
            dataset.tags.delete(name)


def drop_reader_tags(dataset: Any) -> None:
    """Remove the tags of all readers."""
    for name in dict(dataset.tags.list()):
        if name.startswith("reader-"):
            dataset.tags.delete(name)


def clean_up(dataset: Any) -> None:
    """Remove the files of untagged old versions; requires the writer lock."""
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False)


def _arrow() -> Any:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    return pyarrow


def _host() -> str:
    return blake2b(socket.gethostname().encode(), digest_size=6).hexdigest()


def write_signed(backend: Backend, name: str, value: Mapping[str, Any]) -> None:
    """Write a JSON file with a digest of its other entries."""
    # the digest refers to what JSON can store, which excludes NaN
    value = cast("dict[str, Any]", json.loads(to_json(value)))
    backend.write_json(name, {**value, "digest": _digest(value)})


def _read_signed(backend: Backend, name: str) -> dict[str, Any] | None:
    content = backend.read(name)
    if content is None:
        return None
    try:
        value = cast("dict[str, Any]", parse_json(content, any_text=True))
        digest = value.pop("digest")
    except (ValueError, LookupError, AttributeError, TypeError):
        raise BankCorruptionError(f"{backend.uri(name)} is not readable. Restore that file.") from None
    if digest != _digest(value):
        raise BankCorruptionError(f"{backend.uri(name)} was changed after it was written. Restore that file.")
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
