"""The rows of a bank: how gradients become records, how a batch is sorted out, how records are read and checked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank import files as disk
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import (
    BankCorruptionError,
    DuplicatePassageError,
    FingerprintMismatchError,
    listed,
)
from graftwork.methods.regrad.bank.files import GRADIENT, IDS, RECORD, RECORDS
from graftwork.methods.regrad.bank.layout import Layout, Precision, encode

Verify = Literal["always", "first", "never"]

ID_COLUMNS = ("id", "key", "checksum")
VALUE_COLUMNS = ("key", "value", "scale", "tokens", "loss", "norm", "truncated", "checksum")


@dataclass(frozen=True, slots=True)
class Gradient:
    """One passage's gradient on its way into a bank."""

    id: str
    text: str
    """What the gradient was computed from; passages of the same text share one record."""
    values: Any
    """Flat array or tensor of 32-bit numbers, or its tensors by name."""
    tokens: int = 0
    loss: float = float("nan")
    truncated: bool = False
    """Whether the text was cut to the longest length."""


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a batch."""

    written: int = 0
    """New records."""
    aliased: int = 0
    """New ids of texts that had a record."""
    skipped: int = 0
    """Ids that stood for the same text already."""
    replaced: int = 0
    """Ids that stood for another text before."""


@dataclass(slots=True)
class Plan:
    """A batch sorted out: which records and which names are new."""

    records: dict[str, Any]
    names: dict[str, str]
    old: dict[str, str]
    skipped: int


class RecordReader:
    """Reads records, checks them, and keeps the last ones used.

    Args:
        backend: The bank's.
        stride: Bytes of the numbers of one record.
        cache_bytes: Most to keep.
        verify: When to check.
    """

    def __init__(self, backend: Backend, stride: int, cache_bytes: int, verify: Verify) -> None:
        self.backend, self.stride, self.verify, self._cache_bytes = backend, stride, verify, cache_bytes
        self._cache: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._verified: set[str] = set()

    def fetch(self, records: Any, keys: Sequence[str], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The records of these keys, from memory or disk; `names` says which ids lead to them, for messages."""
        found = {key: self._cache[key] for key in keys if key in self._cache}
        for key in found:
            self._cache.move_to_end(key)
        absent = [key for key in keys if key not in found]
        if absent:
            with disk.reading(self.backend, self._belongs(absent, names)):
                fresh = {row["key"]: row for row in disk.rows_where(records, "key", absent, VALUE_COLUMNS)}
            self._check(fresh, absent, names)
            found |= fresh
            for key, row in fresh.items():
                self._remember(key, row)
        elif self.verify == "always":
            self._check(found, keys, names)
        return found

    def _check(self, rows: Mapping[str, Mapping[str, Any]], keys: Sequence[str], names: Mapping[str, str]) -> None:
        due = [key for key in keys if self.verify == "always" or key not in self._verified]
        bad = [
            key
            for key in due
            if key not in rows or (self.verify != "never" and rows[key]["checksum"] != record_checksum(rows[key]))
        ]
        if bad:
            damaged = sorted(name for name, key in names.items() if key in bad)
            raise BankCorruptionError(
                f"{self.backend}: the gradients of {listed(damaged)} are damaged on disk or gone. Delete these "
                "passages, compact, and encode them again.",
                damaged,
            )
        self._verified.update(due)

    def _belongs(self, keys: Sequence[str], names: Mapping[str, str]) -> str:
        wanted = sorted(name for name, key in names.items() if key in set(keys))
        return f"{self.backend.uri(RECORDS)} (for {listed(wanted)})"

    def _remember(self, key: str, row: dict[str, Any]) -> None:
        if self.stride > self._cache_bytes:
            return
        self._cache[key] = row
        while len(self._cache) * self.stride > self._cache_bytes:
            self._cache.popitem(last=False)


def make_plan(backend: Backend, rows: Sequence[tuple[str, str, Any]], records: Any, ids: Any, *, replace: bool) -> Plan:
    """Sort a batch of (id, key, maker) out.

    Raises:
        DuplicatePassageError: If an id stands for another text and is not to be replaced.
    """
    there = keys_of(backend, ids, [name for name, _, _ in rows])
    names: dict[str, str] = {}
    makers: dict[str, Any] = {}
    skipped = 0
    for name, key, maker in rows:
        if not name:
            raise ConfigError("Found a gradient without an id; expected the passage's.")
        known = names.get(name, None if replace else there.get(name))
        if known is not None and known != key:
            raise DuplicatePassageError(
                f"Found another text for passage {name!r}, which is in the bank. Give it another id, or replace it."
            )
        if known == key or there.get(name) == key:
            skipped += 1
            continue
        names[name] = key
        makers.setdefault(key, maker)
    old = {name: there[name] for name in names if name in there}
    present = {row["key"] for row in disk.rows_where(records, "key", list(makers), ["key"])} if makers else set()
    return Plan({key: maker for key, maker in makers.items() if key not in present}, names, old, skipped)


def keys_of(backend: Backend, ids: Any, names: Sequence[str]) -> dict[str, str]:
    """Id to record key of those ids that are there."""
    if not names:
        return {}
    with disk.reading(backend, backend.uri(IDS)):
        rows = list(disk.rows_where(ids, "id", list(names), ID_COLUMNS))
    damaged = [row["id"] for row in rows if row["checksum"] != name_checksum(row["id"], row["key"])]
    if damaged:
        raise BankCorruptionError(f"{backend}: the names {listed(damaged)} were damaged on disk.", damaged)
    return {row["id"]: row["key"] for row in rows}


def encoded(item: Gradient, layout: Layout, precision: Precision) -> dict[str, Any]:
    """A gradient as its record is kept.

    Raises:
        ConfigError: If it is not of this layout, or has numbers that are none.
    """
    values = item.values
    flat = layout.flatten(values) if isinstance(values, Mapping) else np.asarray(values, np.float32).ravel()
    if flat.size != layout.size:
        raise ConfigError(f"Found {flat.size} numbers for passage {item.id!r}; expected {layout.size}.")
    if not np.isfinite(flat).all():
        raise ConfigError(f"Found a gradient of passage {item.id!r} that is not finite. Is its text empty?")
    value, scale = encode(flat, precision)
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    return {
        "value": value,
        "scale": scale,
        "tokens": item.tokens,
        "loss": np.float32(item.loss).item(),
        "norm": np.float32(norm).item(),
        "truncated": item.truncated,
    }


def check_fingerprint(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare what gradients depend on with what a model needs.

    Raises:
        FingerprintMismatchError: If a value differs, or is there on one side only; names it.
    """
    # what the records are comes first, because the rest follows from it
    for name in [RECORD, *sorted({*found, *expected} - {RECORD})]:
        blank = GRADIENT if name == RECORD else "none"
        if found.get(name, blank) != expected.get(name, blank):
            raise FingerprintMismatchError(name, found.get(name, blank), expected.get(name, blank))


def record_checksum(row: Mapping[str, Any]) -> int:
    """What a record must add up to: over its key, its numbers and what is said about them."""
    from xxhash import xxh3_64

    about = np.array([row["scale"], row["tokens"], row["loss"], row["norm"], row["truncated"]], "<f8").tobytes()
    hasher = xxh3_64(row["key"].encode() + about)
    hasher.update(row["value"])
    return hasher.intdigest()


def name_checksum(name: str, key: str) -> int:
    """What a row of the ids must add up to."""
    from xxhash import xxh3_64

    return xxh3_64(f"{len(name)}:{name}{key}".encode()).intdigest()


def name_rows(names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of the ids, from names and the keys of their records."""
    return [{"id": name, "key": key, "checksum": name_checksum(name, key)} for name, key in names.items()]


def insert(dataset: Any, rows: Sequence[Mapping[str, Any]], schema: Any) -> None:
    """Add rows in one commit."""
    import pyarrow as pa

    dataset.insert(pa.Table.from_pylist(list(rows), schema=schema))


def upsert(ids: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add names, or let those that are there lead elsewhere, in one commit."""
    import pyarrow as pa

    table = pa.Table.from_pylist(list(rows), schema=disk.ids_schema())
    ids.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)


def remove(dataset: Any, column: str, values: Sequence[str]) -> None:
    """Take away the rows whose column is one of the values."""
    for condition in disk.conditions(column, values):
        dataset.delete(condition)


def index(dataset: Any, column: str) -> None:
    """Index a column once there are rows; later ones are found by scanning until the next tidying up."""
    if not dataset.describe_indices():
        dataset.create_scalar_index(column, "BTREE")
