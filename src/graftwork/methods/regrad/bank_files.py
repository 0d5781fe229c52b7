"""The files of a bank: two Lance datasets, what is said about them, the writer's lock and the readers' marks."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.files import write_json
from graftwork.methods.regrad.bank_errors import BankCorruptionError, BankLockedError
from graftwork.methods.regrad.storage import Layout, Precision, check_precision, stride

MANIFEST_FILE = "bank.json"
SEAL_FILE = "seal.json"
RECORDS = "records.lance"
IDS = "ids.lance"
LOCK_FILE = "writer.lock"
_OWNER_FILE = "writer.json"
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
    def stride(self) -> int:
        """Bytes of the numbers of one gradient."""
        return stride(self.layout.size, self.precision)

    def write(self, folder: Path) -> None:
        """Write `bank.json`, signed."""
        value = {"schema": 1, "fingerprint": dict(self.fingerprint), "layout": self.layout.plain(),
                 "precision": self.precision, "recorded": dict(self.recorded)}  # fmt: skip
        _write_signed(folder / MANIFEST_FILE, value)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `bank.json`.

        Raises:
            ConfigError: If the folder holds no bank.
            BankCorruptionError: If the file was changed.
        """
        if not (folder / MANIFEST_FILE).exists():
            if (folder / RECORDS).exists():
                raise BankCorruptionError(f"{folder} holds gradients but no {MANIFEST_FILE}. Restore that file.")
            raise ConfigError(f"Found no gradient bank in {folder}; expected {MANIFEST_FILE}. Check the path.")
        value = _read_signed(folder / MANIFEST_FILE)
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

    def write(self, folder: Path) -> None:
        """Write `seal.json`, signed."""
        _write_signed(folder / SEAL_FILE, asdict(self))
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Seal:
        """Read `seal.json`.

        Raises:
            BankCorruptionError: If it is missing or was changed.
        """
        if not (folder / SEAL_FILE).exists():
            raise BankCorruptionError(f"{folder} has no {SEAL_FILE}. Restore that file, or build the bank anew.")
        value = _read_signed(folder / SEAL_FILE)
        return cls(**value)


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
def reading(what: str) -> Iterator[None]:
    """Turn whatever Lance raises over broken files into one kind of error."""
    try:
        yield
    except GraftworkError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise BankCorruptionError(f"{what} cannot be read: {_first_line(error)}") from error
    except BaseException as error:
        # a panic of the Rust side is no Exception, and only its name tells
        if type(error).__name__ != "PanicException":
            raise
        raise BankCorruptionError(f"{what} cannot be read: {_first_line(error)}") from error


def open_dataset(path: Path, version: int | None = None) -> Any:
    """Open one dataset, at a version or at its latest."""
    lance = lance_module()
    with reading(str(path)):
        return lance.dataset(str(path), version=version)


def create_datasets(folder: Path, value_bytes: int) -> None:
    """Write both datasets without rows."""
    import pyarrow as pa

    lance = lance_module()
    for name, schema in ((RECORDS, records_schema(value_bytes)), (IDS, ids_schema())):
        lance.write_dataset(pa.Table.from_pylist([], schema=schema), str(folder / name), mode="create")


def records_schema(value_bytes: int) -> Any:
    """Columns of the gradients."""
    import pyarrow as pa

    return pa.schema([
        pa.field("key", pa.string(), nullable=False), pa.field("value", pa.binary(value_bytes), nullable=False),
        pa.field("scale", pa.float64(), nullable=False), pa.field("tokens", pa.int32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False), pa.field("norm", pa.float32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False), pa.field("checksum", pa.uint64(), nullable=False),
    ])  # fmt: skip


def ids_schema() -> Any:
    """Columns of the names that lead to gradients."""
    import pyarrow as pa

    # Lance then refuses the second of two racing inserts of one id
    primary = {b"lance-schema:unenforced-primary-key": b"true"}
    return pa.schema([
        pa.field("id", pa.string(), nullable=False, metadata=primary), pa.field("key", pa.string(), nullable=False),
        pa.field("checksum", pa.uint64(), nullable=False),
    ])  # fmt: skip


def rows_where(dataset: Any, column: str, values: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows whose column is one of the values; in no order, and none for a value that is not there."""
    for start in range(0, len(values), _KEYS_AT_ONCE):
        part = values[start : start + _KEYS_AT_ONCE]
        quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in part)
        yield from dataset.to_table(columns=list(columns), filter=f"{column} IN ({quoted})").to_pylist()


def sync_new_files(folder: Path, known: set[str]) -> None:
    """Have the disk keep every file that came since the last call; Lance itself never asks for that."""
    for root, _, names in os.walk(folder):
        fresh = [name for name in names if os.path.join(root, name) not in known]
        for name in fresh:
            path = os.path.join(root, name)
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # a reader took its mark away
                continue
            os.fsync(handle)
            os.close(handle)
            if not name.startswith("latest_version_hint"):
                known.add(path)
        if fresh:
            sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writer_lock(folder: Path, timeout: float) -> Iterator[None]:
    """Be the only writer; a killed writer's lock is free at once, because the system holds it.

    Raises:
        BankLockedError: If another writer keeps it for longer; says who and since when.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / LOCK_FILE))
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise BankLockedError(f"{folder} is being written to {_owner(folder)}. Wait for it, or stop it.") from None
    try:
        write_json(folder / _OWNER_FILE, {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()})
        yield
    finally:
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER_FILE).read_text())
    except (OSError, ValueError):
        return "by another process"
    age = time.time() - owner["since"]
    return f"by process {owner['process']} on {owner['host']}, for {age:.0f} s"


def mark_reader(datasets: Sequence[Any]) -> str | None:
    """Protect the versions that a reader has open from being cleaned up."""
    name = f"reader-{_host()}-{os.getpid()}-{time.time_ns()}"
    try:
        for dataset in datasets:
            dataset.tags.create(name, dataset.version)
    except PermissionError:
        return None  # where nothing can be written, nobody tidies up either
    return name


def unmark_reader(datasets: Sequence[Any], name: str) -> None:
    """Give the versions of a reader free; a forked child leaves its parent's alone."""
    if int(name.split("-")[-2]) != os.getpid():
        return
    for dataset in datasets:
        if name in dataset.tags.list():
            dataset.tags.delete(name)


def drop_dead_readers(dataset: Any) -> None:
    """Take away the marks of readers of this machine whose process is no more."""
    for name in list(dataset.tags.list()):
        parts = name.split("-")
        if parts[0] == "reader" and parts[1:-2] == [_host()] and not _alive(int(parts[-2])):
            dataset.tags.delete(name)


def clean_up(dataset: Any) -> None:
    """Remove what no version needs that a reader has open; only for who holds the writer's lock."""
    dataset.cleanup_old_versions(
        older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
    )  # fmt: skip


def _host() -> str:
    return blake2b(socket.gethostname().encode(), digest_size=6).hexdigest()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_signed(path: Path, value: Mapping[str, Any]) -> None:
    write_json(path, {**value, "digest": _signature(value)})


def _read_signed(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = value.pop("digest")
    except (ValueError, KeyError, AttributeError):
        raise BankCorruptionError(f"{path} is not readable. Restore that file.") from None
    if digest != _signature(value):
        raise BankCorruptionError(f"{path} was changed after it was written. Restore that file.")
    return value


def _signature(value: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
