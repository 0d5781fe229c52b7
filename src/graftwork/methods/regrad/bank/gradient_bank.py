"""The gradient bank: passages' gradients on disk or in an object store, found by the passages' ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from weakref import finalize

import numpy as np

from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank import files as disk
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import BankCorruptionError, MissingGradientError
from graftwork.methods.regrad.bank.files import IDS, RECORDS, Manifest, Seal
from graftwork.methods.regrad.bank.layout import Layout, Precision, check_precision, decode
from graftwork.methods.regrad.bank.opening import backend_for
from graftwork.methods.regrad.bank.records import (
    Appended,
    Gradient,
    RecordReader,
    Verify,
    check_fingerprint,
    encoded,
    index,
    insert,
    keys_of,
    make_plan,
    name_rows,
    record_checksum,
    remove,
    upsert,
)

if TYPE_CHECKING:
    import torch

OnMissing = Literal["error", "skip"]

LOCK_SECONDS = 60.0
CACHE_BYTES = 256 << 20
COMPACT_FRAGMENTS = 512
"""Batches after which appending tidies up by itself: every commit repeats the list of all batches before it."""


class GradientBank:
    """Gradients in one backend, with one writer at a time and any number of readers.

    A batch is acknowledged once its files and a seal that counts them are safe on disk. A reader sees the bank as it
    was when it was opened, whatever is appended, deleted or tidied up meanwhile; `refresh` moves it on. Every record
    and every name carries a checksum, because Lance itself does not notice a flipped bit.

    Differs from the original, one file of all gradients of a data set: gradients belong to passages, not to questions.

    Args:
        location: The bank: a folder, or an address in an object store such as s3://bucket/bank.
        mode: "r" to read one state; "a" to read and write the newest.
        fingerprint: What the reader's model needs the gradients to depend on; compared name by name.
        cache_bytes: Most that is kept of records read, least recently used first out.
        verify: Check a record's checksum always, on its first reading by this object, or never.
        lock_seconds: How long to wait for another writer.

    Raises:
        ConfigError: If there is no bank.
        BankUnreachableError: If the object store does not answer.
        BankCorruptionError: If it is older or smaller than its seal says, or a file of it was changed.
        FingerprintMismatchError: If the gradients belong to something else.
    """

    def __init__(
        self,
        location: str | Path | Backend,
        mode: Literal["r", "a"] = "r",
        *,
        fingerprint: Mapping[str, str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        verify: Verify = "first",
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self.backend, self.mode, self.lock_seconds = backend_for(location), mode, lock_seconds
        self.manifest = Manifest.read(self.backend)
        if fingerprint is not None:
            check_fingerprint(self.manifest.fingerprint, fingerprint)
        self._reader = RecordReader(self.backend, self.manifest.stride, cache_bytes, verify)
        self._unmark: finalize[Any, Any] | None = None
        self._open()

    @classmethod
    def create(
        cls,
        location: str | Path | Backend,
        *,
        fingerprint: Mapping[str, str],
        layout: Layout,
        precision: str = "bfloat16",
        recorded: Mapping[str, Any] | None = None,
    ) -> GradientBank:
        """Make an empty bank and open it for writing.

        Args:
            location: Where; must not hold a bank.
            fingerprint: Everything that the gradients depend on, as names and values.
            layout: The tensors of one gradient.
            precision: float32, bfloat16 or int8.
            recorded: What is so now and may change without touching the gradients, such as step sizes.

        Raises:
            ConfigError: If there is a bank already, or none can be there.
            BankUnreachableError: If the object store does not answer.
        """
        backend = backend_for(location)
        disk.check_no_bank(backend)
        backend.prepare()
        manifest = Manifest(dict(fingerprint), layout, check_precision(precision), dict(recorded or {}))
        with backend.write_lock(LOCK_SECONDS):
            disk.check_no_bank(backend)  # of another, made while this one waited
            disk.create_datasets(backend, manifest.stride)
            records, ids = (disk.open_dataset(backend, name) for name in (RECORDS, IDS))
            backend.sync()
            Seal(records.version, ids.version, 0, 0, f"{0:032x}").write(backend)
            # last, because it is what makes a bank of all this
            manifest.write(backend)
        return cls(backend, "a")

    @property
    def layout(self) -> Layout:
        """The tensors of one gradient."""
        return self.manifest.layout

    @property
    def precision(self) -> Precision:
        """How numbers are kept."""
        return self.manifest.precision

    def close(self) -> None:
        """Give the state that this reader saw free."""
        if self._unmark is not None:
            self._unmark()
            self._unmark = None

    def __enter__(self) -> GradientBank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def refresh(self) -> None:
        """See what was written since; costs next to nothing if nothing was."""
        if Seal.read(self.backend) != self.seal:
            self.close()
            self._open()

    def __len__(self) -> int:
        """Number of ids."""
        return self._newest()[1].count_rows()

    def ids(self) -> list[str]:
        """Every id, sorted."""
        with disk.reading(self.backend, self.backend.uri(IDS)):
            return sorted(self._newest()[1].to_table(columns=["id"])["id"].to_pylist())

    def contains(self, ids: Iterable[str]) -> dict[str, bool]:
        """Whether each of the ids has a gradient."""
        names = list(dict.fromkeys(ids))
        found = self.keys(names)
        return {name: name in found for name in names}

    def keys(self, ids: Sequence[str]) -> dict[str, str]:
        """The name of the record that each id leads to, for those that are there; `text_key` of its text."""
        return keys_of(self.backend, self._newest()[1], ids)

    def holds(self, keys: Iterable[str]) -> set[str]:
        """Which of these records are there."""
        with disk.reading(self.backend, self.backend.uri(RECORDS)):
            return {row["key"] for row in disk.rows_where(self._newest()[0], "key", list(keys), ["key"])}

    def append(self, gradients: Iterable[Gradient], *, replace: bool = False) -> Appended:
        """Add a batch, all of it or nothing; what this returned for survives a kill and a loss of power.

        Args:
            gradients: The batch; several passages at once cost far less than one by one.
            replace: Let an id that is there stand for its new text.

        Raises:
            DuplicatePassageError: If an id stands for another text and was not to be replaced; nothing is changed.
            ConfigError: If a gradient is not of this bank's layout, or has numbers that are none.
        """
        rows = [
            (item.id, disk.text_key(item.text), partial(encoded, item, self.layout, self.precision))
            for item in gradients
        ]
        return self.append_records(rows, replace=replace)

    def append_records(
        self, rows: Sequence[tuple[str, str, Callable[[], dict[str, Any]]]], *, replace: bool = False
    ) -> Appended:
        """Add (id, key, maker of the record), as merging does; makers are called for new keys alone."""
        with self._writing() as (records, ids):
            plan = make_plan(self.backend, rows, records, ids, replace=replace)
            if plan.records:
                made = [{**maker(), "key": key} for key, maker in plan.records.items()]
                sealed = [{**row, "checksum": record_checksum(row)} for row in made]
                self.backend.check_lock()
                insert(records, sealed, disk.records_schema(self.manifest.stride))
                index(records, "key")
            if plan.names:
                new = name_rows(plan.names)
                self.backend.check_lock()
                # the names are what makes the records visible
                if plan.old:
                    upsert(ids, new)
                else:
                    insert(ids, new, disk.ids_schema())
                index(ids, "id")
                digest = disk.add_digests(self.seal.ids_digest, list(plan.old.items()), sign=-1)
                self._seal(records, ids, disk.add_digests(digest, list(plan.names.items())))
            if len(records.get_fragments()) > COMPACT_FRAGMENTS:
                self._compact(records, ids)
        count = len(plan.records)
        return Appended(count, len(plan.names) - count if len(plan.names) > count else 0, plan.skipped, len(plan.old))

    def delete(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Take ids away at once; their records go with the next `compact` unless another id leads to them.

        Returns:
            The ids that were not there.
        """
        names = list(dict.fromkeys(ids))
        with self._writing() as (records, table):
            found = keys_of(self.backend, table, names)
            remove(table, "id", list(found))
            self._seal(records, table, disk.add_digests(self.seal.ids_digest, list(found.items()), sign=-1))
        return tuple(name for name in names if name not in found)

    def compact(self) -> None:
        """Give the space of deleted and left-over records back, except what a reader still has open."""
        with self._writing() as (records, ids):
            self._compact(records, ids)

    def rows(self, ids: Sequence[str], *, on_missing: OnMissing = "error") -> dict[str, dict[str, Any]]:
        """The stored record of each id: value, scale, tokens, loss, norm, truncated; checked as `verify` says.

        Raises:
            MissingGradientError: If an id has none and missing ones are an error.
            BankCorruptionError: If a record is not what was written; names the ids.
        """
        try:
            return self._rows(ids, on_missing)
        except BankCorruptionError:
            # somebody may have tidied up under who holds no mark, such as a writer; then there is a newer seal
            if self._unmark is not None or Seal.read(self.backend) == self.seal:
                raise
            self.refresh()
            return self._rows(ids, on_missing)

    def get(
        self,
        ids: Sequence[str],
        *,
        on_missing: OnMissing = "error",
        dtype: torch.dtype | None = None,
        device: Any = "cpu",
    ) -> torch.Tensor:
        """Gradients, one below the other.

        Args:
            ids: Passages, in the order wanted.
            on_missing: "error", or "skip" to leave out what is not there.
            dtype: Type of the result; 32-bit by default.
            device: Where to put it.

        Returns:
            Tensor of shape [ids found, numbers of one gradient]; `layout.split` cuts it into tensors.
        """
        import torch

        found = self.rows(ids, on_missing=on_missing)
        stacked = [self._numbers(found[name]) for name in ids if name in found]
        flat = np.stack(stacked) if stacked else np.zeros((0, self.layout.size), np.float32)
        return torch.from_numpy(np.array(flat)).to(device=device, dtype=dtype or torch.float32)

    def sum(
        self, weights: Mapping[str, float], *, on_missing: OnMissing = "error", device: Any = "cpu"
    ) -> torch.Tensor:
        """The weighted sum of gradients, the same to the last bit for every order of the weights.

        Weights of ids that lead to one record are added.

        Returns:
            Flat tensor of 32-bit numbers; zeros for no passage.
        """
        return self.sums([weights], on_missing=on_missing)[0].to(device)

    def sums(self, weights: Sequence[Mapping[str, float]], *, on_missing: OnMissing = "error") -> torch.Tensor:
        """`sum` for several sets of weights, read from disk together: tensor of shape [sets, numbers]."""
        import torch

        found = self.rows(sorted({name for one in weights for name in one}), on_missing=on_missing)
        result = torch.zeros(len(weights), self.layout.size, dtype=torch.float32)
        for into, own in zip(result, weights, strict=True):
            total: dict[int, tuple[dict[str, Any], float]] = {}
            for name in sorted(found.keys() & own.keys()):
                total[id(found[name])] = (found[name], total.get(id(found[name]), (0, 0.0))[1] + own[name])
            for row, weight in total.values():
                into += torch.from_numpy(np.array(self._numbers(row))) * weight
        return result

    def stats(self) -> dict[str, Any]:
        """How much is in the bank and how much room it takes."""
        records, ids = self._newest()
        return {
            "ids": ids.count_rows(),
            "records": records.count_rows(),
            "precision": self.precision,
            "numbers": self.layout.size,
            "bytes_per_record": self.manifest.stride,
            "bytes": self.backend.size(),
            "batches": len(records.get_fragments()),
        }

    def _rows(self, ids: Sequence[str], on_missing: OnMissing) -> dict[str, dict[str, Any]]:
        names = list(dict.fromkeys(ids))
        keys = self.keys(names)
        missing = [name for name in names if name not in keys]
        if missing and on_missing == "error":
            raise MissingGradientError(missing)
        records = self._reader.fetch(self._records, list(dict.fromkeys(keys.values())), keys)
        return {name: records[keys[name]] for name in names if name in keys}

    def _open(self) -> None:
        """Open the sealed versions, marked if only to read; someone tidying up in between is no error."""
        for attempt in range(5):
            self.seal = Seal.read(self.backend)
            try:
                self._records, self._ids = self._sealed()
                if self.mode == "r":
                    opened = (self._records, self._ids)
                    mark = disk.mark_reader(self.backend, opened)
                    # also for who forgets to close
                    self._unmark = None if mark is None else finalize(self, disk.unmark_reader, opened, mark)
                break
            except BankCorruptionError:
                if attempt == 4 or Seal.read(self.backend) == self.seal:
                    raise
        counts = (self._records.count_rows(), self._ids.count_rows())
        if counts != (self.seal.records, self.seal.ids):
            raise BankCorruptionError(
                f"{self.backend} holds {counts[0]} records and {counts[1]} ids; its seal says {self.seal.records} and "
                f"{self.seal.ids}. Restore it from a copy."
            )

    def _sealed(self) -> tuple[Any, Any]:
        versions = {RECORDS: self.seal.records_version, IDS: self.seal.ids_version}
        return tuple(disk.open_dataset(self.backend, name, version) for name, version in versions.items())  # type: ignore[return-value]

    def _newest(self) -> tuple[Any, Any]:
        if self.mode == "a":
            self.refresh()
        return self._records, self._ids

    @contextmanager
    def _writing(self) -> Iterator[tuple[Any, Any]]:
        """Both datasets at their latest, for the only writer."""
        if self.mode != "a":
            raise ConfigError(f"{self.backend} was opened for reading. Open it with mode 'a' to change it.")
        with self.backend.write_lock(self.lock_seconds), disk.reading(self.backend):
            self.seal = Seal.read(self.backend)
            self._sealed()  # what was acknowledged must still be there
            records, ids = (disk.open_dataset(self.backend, name) for name in (RECORDS, IDS))
            if records.version < self.seal.records_version or ids.version < self.seal.ids_version:
                raise BankCorruptionError(f"{self.backend} is older than its seal. Restore it from a copy.")
            if ids.version > self.seal.ids_version:
                # a writer was killed between its commit and its seal: the batch is whole, only not counted yet
                rows = ids.to_table(columns=["id", "key"]).to_pylist()
                self._seal(records, ids, disk.add_digests("0", [(row["id"], row["key"]) for row in rows]))
            yield records, ids
            self._records, self._ids = records, ids

    def _seal(self, records: Any, ids: Any, digest: str) -> None:
        self.backend.sync()
        self.backend.check_lock()
        self.seal = Seal(records.version, ids.version, records.count_rows(), ids.count_rows(), digest)
        self.seal.write(self.backend)

    def _compact(self, records: Any, ids: Any) -> None:
        used = set(ids.to_table(columns=["key"])["key"].to_pylist())
        orphans = [key for key in records.to_table(columns=["key"])["key"].to_pylist() if key not in used]
        remove(records, "key", orphans)
        for dataset in (records, ids):
            dataset.optimize.compact_files(materialize_deletions_threshold=0)
            dataset.optimize.optimize_indices()
            dataset.checkout_latest()
        # sealed before the old files go, so that a kill leaves one state or the other
        self._seal(records, ids, self.seal.ids_digest)
        for dataset in (records, ids):
            disk.drop_dead_readers(dataset, self.backend.tag_lifetime)
            disk.clean_up(dataset)

    def _numbers(self, row: Mapping[str, Any]) -> np.ndarray:
        return decode(row["value"], self.layout.size, self.precision, row["scale"])
