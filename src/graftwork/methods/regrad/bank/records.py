"""Rows of a bank: encoding gradients, planning an append, reading and verifying records."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from graftwork.core import faults
from graftwork.errors import ConfigError, NonFiniteError
from graftwork.methods.regrad.bank import files
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import (
    BankCorruptionError,
    DuplicatePassageError,
    FingerprintMismatchError,
    listed,
)
from graftwork.methods.regrad.bank.files import BASE, GRADIENT, IDS, RECORD, RECORDS, ROUNDED, TYPE
from graftwork.methods.regrad.bank.layout import Layout, Precision, encode
from graftwork.methods.regrad.bank.lookup import Lookup, is_index_due

Verify = Literal["always", "first", "never"]
"""Reads whose checksum is verified: all, the first read of each record, or none."""
Record = dict[str, Any]
"""One row of the records: value and metadata, see `files.records_schema`."""
RecordMaker = Callable[[], Record]
"""Builds a record without its checksum; called only if the bank lacks the key."""

Rows = Callable[[Sequence[str], Sequence[str]], list[dict[str, Any]]]
"""Rows of values, with the given columns: `Lookup.rows` of one dataset."""

ID_COLUMNS = ("id", "key", "checksum")
VALUE_COLUMNS = ("key", "value", "scale", "tokens", "loss", "norm", "truncated", "checksum")


@dataclass(frozen=True, slots=True)
class Gradient:
    """One passage's gradient, to be appended to a bank."""

    id: str
    text: str
    """Text that the gradient was computed from; passages with equal texts share one record."""
    values: Any
    """Flat float32 array or tensor [numbers], or the tensors by name."""
    tokens: int = 0
    loss: float = float("nan")
    truncated: bool = False
    """True if the text was cut to the maximum length."""


@dataclass(frozen=True, slots=True)
class Appended:
    """Counts of an append."""

    written: int = 0
    """New records."""
    aliased: int = 0
    """New ids of texts that already had a record."""
    skipped: int = 0
    """Ids that already referred to the same text."""
    replaced: int = 0
    """Ids that referred to another text before."""


@dataclass(slots=True)
class AppendPlan:
    """Changes that an append makes to the records and ids."""

    records: dict[str, RecordMaker]
    """Key to maker of each new record."""
    names: dict[str, str]
    """Id to record key of each new or changed id."""
    old: dict[str, str]
    """Id to previous record key of each changed id."""
    skipped: int
    """Number of ids that need no change."""


class RecordReader:
    """Reads and verifies records, with a least-recently-used cache.

    Args:
        backend: Backend of the bank.
        stride: Number of bytes of one encoded gradient.
        cache_bytes: Capacity of the cache; 0 disables it.
        verify: Reads whose checksum is verified.
    """

    def __init__(self, backend: Backend, stride: int, cache_bytes: int, verify: Verify) -> None:
        self.backend, self.stride, self.verify, self._cache_bytes = backend, stride, verify, cache_bytes
        self.lookup = Lookup("key")
        self._cache: OrderedDict[str, Record] = OrderedDict()
        self._verified: set[str] = set()

    def fetch(self, records: Any, keys: Sequence[str], names: Mapping[str, str]) -> dict[str, Record]:
        """Return records by key, from the cache or from storage.

        Args:
            records: Lance dataset of the records.
            keys: Keys of the records.
            names: Id to record key, for error messages.

        Raises:
            BankCorruptionError: If a record is missing or fails its checksum.
        """
        found = {key: self._cache[key] for key in keys if key in self._cache}
        for key in found:
            self._cache.move_to_end(key)
        absent = [key for key in keys if key not in found]
        if absent:
            with files.reading(self.backend, self._describe(absent, names)):
                fresh: dict[str, Record] = {row["key"]: row for row in self.lookup.rows(records, absent, VALUE_COLUMNS)}
            self._check(fresh, absent, names)
            found |= fresh
            for key, row in fresh.items():
                self._remember(key, row)
        elif self.verify == "always":
            self._check(found, keys, names)
        return found

    def forget(self) -> None:
        """Empty the cache."""
        self._cache.clear()

    def _check(self, rows: Mapping[str, Record], keys: Sequence[str], names: Mapping[str, str]) -> None:
        due = [key for key in keys if self.verify == "always" or key not in self._verified]
        bad = [
            key
            for key in due
            if key not in rows or (self.verify != "never" and rows[key]["checksum"] != record_checksum(rows[key]))
        ]
        if bad:
            damaged = sorted(name for name, key in names.items() if key in bad)
            raise BankCorruptionError(
                f"{self.backend}: the gradients of {listed(damaged)} are damaged or missing. Delete these passages, "
                "compact, and encode them again.",
                damaged,
            )
        self._verified.update(due)

    def _describe(self, keys: Sequence[str], names: Mapping[str, str]) -> str:
        wanted = sorted(name for name, key in names.items() if key in set(keys))
        return f"{self.backend.uri(RECORDS)} (for {listed(wanted)})"

    def _remember(self, key: str, row: Record) -> None:
        if self.stride > self._cache_bytes:
            return
        self._cache[key] = row
        while len(self._cache) * self.stride > self._cache_bytes:
            self._cache.popitem(last=False)


def plan_append(
    backend: Backend,
    rows: Sequence[tuple[str, str, RecordMaker]],
    records: Rows,
    ids: Rows,
    *,
    replace: bool,
) -> AppendPlan:
    """Determine which records and ids of a batch are new.

    Args:
        backend: Backend of the bank.
        rows: Id, record key and record maker of each passage.
        records: Rows of the records.
        ids: Rows of the ids.
        replace: Let existing ids refer to their new texts.

    Raises:
        DuplicatePassageError: If an id refers to another text and `replace` is off.
        ConfigError: If an id is empty.
    """
    existing = keys_of(backend, ids, [name for name, _, _ in rows])
    names: dict[str, str] = {}
    makers: dict[str, RecordMaker] = {}
    skipped = 0
    for name, key, maker in rows:
        if not name:
            raise ConfigError("Found a gradient without an id; expected the id of its passage.")
        known = names.get(name, None if replace else existing.get(name))
        if known is not None and known != key:
            raise DuplicatePassageError(
                f"Found another text for passage {name!r}, which is in the bank. Give it another id, or replace it."
            )
        if known == key or existing.get(name) == key:
            skipped += 1
            continue
        names[name] = key
        makers.setdefault(key, maker)
    old = {name: existing[name] for name in names if name in existing}
    present: set[str] = set()
    if makers:
        present = {row["key"] for row in records(list(makers), ["key"])}
    return AppendPlan({key: maker for key, maker in makers.items() if key not in present}, names, old, skipped)


def write_plan(backend: Backend, records: Any, ids: Any, plan: AppendPlan, stride: int) -> None:
    """Write the new records of a plan, and then its ids, through which the records become visible.

    Args:
        backend: Backend of the bank, whose lock the caller holds.
        records: Lance dataset of the records.
        ids: Lance dataset of the ids.
        plan: Result of `plan_append`.
        stride: Number of bytes of one encoded gradient.
    """
    if plan.records:
        made = [{**maker(), "key": key} for key, maker in plan.records.items()]
        rows = [{**row, "checksum": record_checksum(row)} for row in made]
        backend.check_lock()
        insert(records, rows, files.records_schema(stride))
        index(records, "key")
        faults.point("bank.records", str(backend))
    if plan.names:
        names = name_rows(plan.names)
        backend.check_lock()
        if plan.old:
            upsert(ids, names)
        else:
            insert(ids, names, files.ids_schema())
        index(ids, "id")
        faults.point("bank.ids", str(backend))


def keys_of(backend: Backend, ids: Rows, names: Sequence[str]) -> dict[str, str]:
    """Return id to record key of those names that the ids contain.

    Raises:
        BankCorruptionError: If a row fails its checksum.
    """
    if not names:
        return {}
    with files.reading(backend, backend.uri(IDS)):
        rows = ids(list(names), ID_COLUMNS)
    damaged = [row["id"] for row in rows if row["checksum"] != name_checksum(row["id"], row["key"])]
    if damaged:
        raise BankCorruptionError(f"{backend}: the entries of ids {listed(damaged)} are damaged.", damaged)
    return {row["id"]: row["key"] for row in rows}


def encoded(item: Gradient, layout: Layout, precision: Precision) -> Record:
    """Encode a gradient as a record without key and checksum.

    Raises:
        ConfigError: If the gradient does not match the layout.
        NonFiniteError: If it contains NaN or infinity.
    """
    values = item.values
    if isinstance(values, Mapping):
        flat = layout.flatten(cast("Mapping[str, Any]", values))
    else:
        flat = np.asarray(values, np.float32).ravel()
    if flat.size != layout.size:
        raise ConfigError(f"Found {flat.size} numbers for passage {item.id!r}; expected {layout.size}.")
    faults.point("bank.gradients", RECORDS, (flat,))
    if not np.isfinite(flat).all():
        raise NonFiniteError(f"Found a gradient of passage {item.id!r} that is not finite. Is its text empty?")
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
    """Compare the fingerprint of stored gradients with that of a model.

    Base weights of different types are compared after rounding to bfloat16, so that those of one checkpoint are equal
    in whatever type they were loaded; fingerprints of earlier versions have the digest in one type only.

    Raises:
        FingerprintMismatchError: If an entry differs or exists on one side only; names the entry.
    """
    # the kind of records comes first, because a different kind implies other differences
    both = ROUNDED in found and ROUNDED in expected
    ignored = {BASE, TYPE} if both and found.get(TYPE) != expected.get(TYPE) else {ROUNDED, TYPE}
    for name in [RECORD, *sorted({*found, *expected} - {RECORD, *ignored})]:
        blank = GRADIENT if name == RECORD else "none"
        if found.get(name, blank) != expected.get(name, blank):
            raise FingerprintMismatchError(name, found.get(name, blank), expected.get(name, blank))


def record_checksum(row: Mapping[str, Any]) -> int:
    """64-bit checksum over a record's key, metadata and encoded numbers."""
    from xxhash import xxh3_64

    about = np.array([row["scale"], row["tokens"], row["loss"], row["norm"], row["truncated"]], "<f8").tobytes()
    hasher = xxh3_64(row["key"].encode() + about)
    hasher.update(row["value"])
    return hasher.intdigest()


def name_checksum(name: str, key: str) -> int:
    """64-bit checksum of a row of the ids."""
    from xxhash import xxh3_64

    return xxh3_64(f"{len(name)}:{name}{key}".encode()).intdigest()


def name_rows(names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return rows of the ids, from ids and record keys."""
    return [{"id": name, "key": key, "checksum": name_checksum(name, key)} for name, key in names.items()]


def insert(dataset: Any, rows: Sequence[Mapping[str, Any]], schema: Any) -> None:
    """Append rows to a dataset in one commit."""
    dataset.insert(files.arrow_table(rows, schema))


def upsert(ids: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert ids, or update the record keys of existing ones, in one commit."""
    table = files.arrow_table(rows, files.ids_schema())
    ids.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)


def remove(dataset: Any, column: str, values: Sequence[str]) -> None:
    """Delete the rows whose column equals one of the values."""
    for condition in files.conditions(column, values):
        dataset.delete(condition)


def index(dataset: Any, column: str) -> None:
    """Create the index of a column, or update it if it lacks many rows; `Lookup` finds the others."""
    if not dataset.describe_indices():
        dataset.create_scalar_index(column, "BTREE")
    elif is_index_due(dataset):
        dataset.optimize.optimize_indices()
        dataset.checkout_latest()


def shared_weights(found: Mapping[str, Record], weights: Mapping[str, float]) -> list[tuple[Record, float]]:
    """Return each record with the sum of its ids' weights, in an order that does not depend on that of the weights."""
    total: dict[int, tuple[Record, float]] = {}
    for name in sorted(found.keys() & weights.keys()):
        before = total[id(found[name])][1] if id(found[name]) in total else 0.0
        total[id(found[name])] = (found[name], before + weights[name])
    return list(total.values())
