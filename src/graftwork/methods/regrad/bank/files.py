"""The files of a bank: two Lance datasets, what is said about them, and the readers' marks."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.methods.regrad.bank.backends import Backend, alive, first_line
from graftwork.methods.regrad.bank.errors import BankCorruptionError
from graftwork.methods.regrad.bank.layout import Layout, Precision, check_precision, stride
from graftwork.methods.regrad.bank.opening import backend_for

MANIFEST_FILE = "bank.json"
SEAL_FILE = "seal.json"
RECORDS = "records.lance"
IDS = "ids.lance"
RECORD, GRADIENT, TRAINED_ADAPTER = "record", "gradient", "trained adapter"
"""Name and values of what a bank's records are, in its fingerprint; one that does not say holds gradients."""
TRAINING_FIELDS = (RECORD, "training", "question wording")
"""Names in the fingerprint of a bank of trained adapters that one of gradients does not have."""
_MODULUS = 1 << 128
_KEYS_AT_ONCE = 500


@dataclass(frozen=True)
class Manifest:
    """What a bank is, once and for all."""

    fingerprint: Mapping[str, str]
    """Name to value of everything that the gradients depend on."""
    layout: Layout
    precision: Precision
    recorded: Mapping[str, Any]
    """What was so when the bank was made and may change, such as the step sizes."""

    @property
    def record(self) -> str:
        """What its records are: gradients, or trained adapters."""
        return self.fingerprint.get(RECORD, GRADIENT)

    @property
    def stride(self) -> int:
        """Bytes of the numbers of one gradient."""
        return stride(self.layout.size, self.precision)

    def write(self, backend: Backend) -> None:
        """Write `bank.json`, signed."""
        value = {
            "schema": 1,
            "fingerprint": dict(self.fingerprint),
            "layout": self.layout.plain(),
            "precision": self.precision,
            "recorded": dict(self.recorded),
        }
        _write_signed(backend, MANIFEST_FILE, value)

    @classmethod
    def read(cls, backend: Backend) -> Manifest:
        """Read `bank.json`.

        Raises:
            ConfigError: If there is no bank.
            BankCorruptionError: If the file was changed.
            BankUnreachableError: If the backend does not answer.
        """
        value = _read_signed(backend, MANIFEST_FILE)
        if value is None:
            if backend.exists(RECORDS):
                raise BankCorruptionError(f"{backend} holds gradients but no {MANIFEST_FILE}. Restore that file.")
            raise ConfigError(f"Found no gradient bank in {backend}; expected {MANIFEST_FILE}. Check the path.")
        layout = Layout.of((name, shape) for name, shape in value["layout"])
        return cls(value["fingerprint"], layout, check_precision(value["precision"]), value["recorded"])


@dataclass(frozen=True)
class Seal:
    """What was safe on disk when the last batch was acknowledged."""

    records_version: int
    ids_version: int
    records: int
    ids: int
    ids_digest: str

    def write(self, backend: Backend) -> None:
        """Write `seal.json`, signed."""
        _write_signed(backend, SEAL_FILE, asdict(self))

    @classmethod
    def read(cls, backend: Backend) -> Seal:
        """Read `seal.json`.

        Raises:
            BankCorruptionError: If it is missing or was changed.
        """
        value = _read_signed(backend, SEAL_FILE)
        if value is None:
            raise BankCorruptionError(f"{backend} has no {SEAL_FILE}. Restore that file, or build the bank anew.")
        return cls(**value)


def holds_bank(location: str | Path | Backend) -> bool:
    """Whether there is a bank.

    Raises:
        ConfigError: If it is the address of something else.
        BankUnreachableError: If the backend does not answer.
    """
    return backend_for(location).exists(MANIFEST_FILE)


def check_no_bank(backend: Backend) -> None:
    """Make sure that a new bank is not made over another.

    Raises:
        ConfigError: If there is one.
    """
    if holds_bank(backend):
        raise ConfigError(f"Found a bank in {backend} already. Open it to add to it, or name another folder.")


def row_digest(name: str, key: str) -> int:
    """A number of 128 bits that stands for one row of the ids; sums of them do not depend on the order of rows."""
    return int.from_bytes(blake2b(f"{len(name)}:{name}{key}".encode(), digest_size=16).digest(), "little")


def add_digests(total: str, rows: Sequence[tuple[str, str]], sign: int = 1) -> str:
    """The digest of the ids after rows came (or, with sign −1, went)."""
    return f"{(int(total, 16) + sign * sum(row_digest(*row) for row in rows)) % _MODULUS:032x}"


def text_key(text: str) -> str:
    """What names the record of a text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def lance_module() -> Any:
    """The `lance` package.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import lance
    except ImportError:
        raise MissingExtraError("pylance", "regrad") from None
    return lance


@contextmanager
def reading(backend: Backend, *names: str) -> Iterator[None]:
    """Turn whatever Lance raises over broken files into one kind of error.

    Args:
        backend: The bank's.
        names: What is read, for the message; the whole backend by default.
    """
    what = ", ".join(names) or str(backend)
    try:
        yield
    except GraftworkError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        backend.check()
        raise BankCorruptionError(f"{what} cannot be read: {first_line(error)}") from error
    except BaseException as error:
        # a panic of the Rust side is no Exception, and only its name tells
        if type(error).__name__ != "PanicException":
            raise
        raise BankCorruptionError(f"{what} cannot be read: {first_line(error)}") from error


def open_dataset(backend: Backend, name: str, version: int | None = None) -> Any:
    """Open one dataset, at a version or at its latest."""
    lance = lance_module()
    uri = backend.uri(name)
    with reading(backend, uri):
        return lance.dataset(uri, version=version, storage_options=backend.options)


def create_datasets(backend: Backend, value_bytes: int) -> None:
    """Write both datasets without rows; those that a killed call of this left are taken.

    Raises:
        BankCorruptionError: If there are rows already.
    """
    import pyarrow as pa

    lance = lance_module()
    for name, schema in ((RECORDS, records_schema(value_bytes)), (IDS, ids_schema())):
        empty = pa.Table.from_pylist([], schema=schema)
        with reading(backend, backend.uri(name)), suppress(OSError, ValueError):
            if lance.dataset(backend.uri(name), storage_options=backend.options).count_rows():
                raise BankCorruptionError(f"{backend} holds gradients but no {MANIFEST_FILE}. Restore that file.")
            continue
        with reading(backend, backend.uri(name)):
            lance.write_dataset(empty, backend.uri(name), mode="create", storage_options=backend.options)


def records_schema(value_bytes: int) -> Any:
    """Columns of the gradients."""
    import pyarrow as pa

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
    """Columns of the names that lead to gradients."""
    import pyarrow as pa

    # Lance then refuses the second of two racing inserts of one id
    primary = {b"lance-schema:unenforced-primary-key": b"true"}
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=primary),
            pa.field("key", pa.string(), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
        ]
    )


def rows_where(dataset: Any, column: str, values: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows whose column is one of the values; in no order, and none for a value that is not there."""
    for condition in conditions(column, values):
        yield from dataset.to_table(columns=list(columns), filter=condition).to_pylist()


def conditions(column: str, values: Sequence[str]) -> Iterator[str]:
    """That a column is one of the values, as Lance reads it; several conditions, because a long one is slow."""
    for start in range(0, len(values), _KEYS_AT_ONCE):
        quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values[start : start + _KEYS_AT_ONCE])
        yield f"{column} IN ({quoted})"


def mark_reader(backend: Backend, datasets: Sequence[Any]) -> str | None:
    """Protect the versions that a reader has open from being cleaned up; None where nothing can be written."""
    name = f"reader-{_host()}-{os.getpid()}-{time.time_ns()}"
    try:
        for dataset in datasets:
            dataset.tags.create(name, dataset.version)
    except OSError as error:
        if not backend.is_write_refusal(error):
            raise
        return None
    return name


def unmark_reader(datasets: Sequence[Any], name: str) -> None:
    """Give the versions of a reader free; a forked child leaves its parent's alone."""
    if int(name.split("-")[-2]) != os.getpid():
        return
    # a mark that cannot be taken away goes when it is old; this is called when a process ends, too
    with suppress(OSError):
        for dataset in datasets:
            if name in dataset.tags.list():
                dataset.tags.delete(name)


def drop_dead_readers(dataset: Any, longest: timedelta | None = None) -> None:
    """Take away the marks of readers of this machine whose process is no more, and any mark after the longest time."""
    for name, about in dict(dataset.tags.list()).items():
        parts = name.split("-")
        if parts[0] != "reader":
            continue
        here = parts[1:-2] == [_host()]
        made = None if longest is None else about.get("created_at")
        if (here and not alive(int(parts[-2]))) or (made is not None and datetime.now(UTC) - made > longest):
            dataset.tags.delete(name)


def clean_up(dataset: Any) -> None:
    """Remove what no version needs that a reader has open; only for who holds the writer's lock."""
    dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False)


def _host() -> str:
    return blake2b(socket.gethostname().encode(), digest_size=6).hexdigest()


def _write_signed(backend: Backend, name: str, value: Mapping[str, Any]) -> None:
    backend.write_json(name, {**value, "digest": _signature(value)})


def _read_signed(backend: Backend, name: str) -> dict[str, Any] | None:
    content = backend.read(name)
    if content is None:
        return None
    try:
        value = json.loads(content)
        digest = value.pop("digest")
    except (ValueError, KeyError, AttributeError):
        raise BankCorruptionError(f"{backend.uri(name)} is not readable. Restore that file.") from None
    if digest != _signature(value):
        raise BankCorruptionError(f"{backend.uri(name)} was changed after it was written. Restore that file.")
    return value


def _signature(value: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
