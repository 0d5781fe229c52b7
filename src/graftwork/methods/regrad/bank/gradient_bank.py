"""Gradient bank: gradients of passages in a folder or an object store, addressed by passage id."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from graftwork.core import faults
from graftwork.core.storage import writing
from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank import compaction, files
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import BankCorruptionError, MissingGradientError
from graftwork.methods.regrad.bank.files import IDS, RECORDS, CommitRecord, Manifest
from graftwork.methods.regrad.bank.layout import FloatArray, Layout, Precision, check_precision, decode
from graftwork.methods.regrad.bank.lookup import Lookup
from graftwork.methods.regrad.bank.opening import backend_for
from graftwork.methods.regrad.bank.records import (
    Appended,
    Gradient,
    Record,
    RecordMaker,
    RecordReader,
    Verify,
    check_fingerprint,
    encoded,
    keys_of,
    plan_append,
    remove,
    shared_weights,
    write_plan,
)
from graftwork.methods.regrad.bank.snapshot import Snapshot, open_latest

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
OnMissing = Literal["error", "skip"]

LOCK_SECONDS = 60.0
CACHE_BYTES = 256 << 20


class GradientBank:
    """Persistent store of gradients with one writer at a time and any number of readers.

    A batch is acknowledged once its files and a commit record that counts them are durable. A reader sees the state at
    the time of opening, regardless of later appends, deletions and compactions; `refresh` moves it to the newest state.
    Every record and every id carries a checksum, because Lance itself does not detect a flipped bit.

    Differs from the original, one file of all gradients of a data set: gradients belong to passages, not to questions.

    Args:
        location: The bank: a folder, or an address in an object store such as s3://bucket/bank.
        mode: "r" to read one state; "a" to read and write the newest.
        fingerprint: Everything that the reader's gradients must depend on; compared entry by entry.
        cache_bytes: Capacity of the record cache, least recently used first out.
        verify: Verify a record's checksum always, on its first read by this object, or never.
        lock_seconds: Longest wait for another writer.

    Raises:
        ConfigError: If there is no bank.
        BankUnreachableError: If the object store does not respond.
        BankCorruptionError: If it is older or smaller than its commit record, or one of its files was changed.
        FingerprintMismatchError: If the gradients belong to another model or corpus.
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
        self._ids = Lookup("id")
        self._pins = 0
        self.snapshot = Snapshot.open(self.backend, tag=mode == "r")
        """State that reads refer to."""

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
        """Create an empty bank and open it for writing.

        Args:
            location: Location of the new bank; must not contain one.
            fingerprint: Everything that the gradients depend on, as names and values.
            layout: Tensors of one gradient.
            precision: float32, bfloat16 or int8.
            recorded: Current state that may change without invalidating gradients, such as step sizes.

        Raises:
            ConfigError: If the location contains a bank, or cannot store one safely.
            BankUnreachableError: If the object store does not respond.
        """
        backend = backend_for(location)
        files.check_no_bank(backend)
        backend.prepare()
        manifest = Manifest(dict(fingerprint), layout, check_precision(precision), dict(recorded or {}))
        with writing(str(backend)), backend.write_lock(LOCK_SECONDS):
            files.check_no_bank(backend)  # created by another process during the wait
            files.create_datasets(backend, manifest.stride)
            faults.point("bank.datasets", str(backend))
            records, ids = (files.open_dataset(backend, name) for name in (RECORDS, IDS))
            backend.sync()
            CommitRecord(records.version, ids.version, 0, 0, f"{0:032x}").write(backend)
            faults.point("bank.recorded", str(backend))
            # last, because the manifest marks the bank as complete
            manifest.write(backend)
        return cls(backend, "a")

    @property
    def commit_record(self) -> CommitRecord:
        """Commit record of the open state."""
        return self.snapshot.commit_record

    @property
    def layout(self) -> Layout:
        """Tensors of one gradient."""
        return self.manifest.layout

    @property
    def precision(self) -> Precision:
        """Storage format of the numbers."""
        return self.manifest.precision

    def close(self) -> None:
        """Release the open state, so that a compaction can remove its files."""
        self.snapshot.close()

    def __enter__(self) -> GradientBank:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def refresh(self) -> bool:
        """Move to the newest state; cheap if nothing was written. Return True if it moved."""
        if CommitRecord.read(self.backend) == self.commit_record:
            return False
        if Manifest.read(self.backend) != self.manifest:
            raise BankCorruptionError(f"{self.backend} was replaced by another bank. Open it again.")
        self.close()
        self.snapshot = Snapshot.open(self.backend, tag=self.mode == "r")
        return True

    @contextmanager
    def pinned(self) -> Generator[None]:
        """Inside, reads of a bank that is open for writing refer to its open state, not to the newest."""
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1

    def __len__(self) -> int:
        """Number of ids."""
        return self._newest().ids.count_rows()

    def ids(self) -> list[str]:
        """Return all ids, sorted."""
        with files.reading(self.backend, self.backend.uri(IDS)):
            return sorted(self._newest().ids.to_table(columns=["id"])["id"].to_pylist())

    def contains(self, ids: Iterable[str]) -> dict[str, bool]:
        """Map each id to True if it has a gradient."""
        names = list(dict.fromkeys(ids))
        found = self.keys(names)
        return {name: name in found for name in names}

    def keys(self, ids: Sequence[str]) -> dict[str, str]:
        """Map each existing id to the key of its record, the `text_key` of its text."""
        return self._retried(lambda: keys_of(self.backend, partial(self._ids.rows, self._newest().ids), ids))

    def holds(self, keys: Iterable[str]) -> set[str]:
        """Return the subset of keys that have a record."""
        with files.reading(self.backend, self.backend.uri(RECORDS)):
            return {row["key"] for row in self._reader.lookup.rows(self._newest().records, list(keys), ["key"])}

    def append(self, gradients: Iterable[Gradient], *, replace: bool = False) -> Appended:
        """Add a batch atomically; it is durable when this method returns.

        Args:
            gradients: The batch; one call for many passages costs far less than one call each.
            replace: Let existing ids refer to their new texts.

        Raises:
            DuplicatePassageError: If an id refers to another text and `replace` is off; the bank is unchanged.
            ConfigError: If a gradient does not match the layout.
            NonFiniteError: If a gradient contains NaN or infinity; the bank is unchanged.
        """
        rows = [
            (item.id, files.text_key(item.text), partial(encoded, item, self.layout, self.precision))
            for item in gradients
        ]
        return self.append_records(rows, replace=replace)

    def append_records(self, rows: Sequence[tuple[str, str, RecordMaker]], *, replace: bool = False) -> Appended:
        """Add encoded records atomically, for example when merging banks.

        Args:
            rows: Id, record key and record maker of each passage; makers are called for new keys only.
            replace: Let existing ids refer to their new texts.
        """
        with self._writing() as work:
            known_records, known_ids = (
                partial(self._reader.lookup.rows, work.records),
                partial(self._ids.rows, work.ids),
            )
            plan = plan_append(self.backend, rows, known_records, known_ids, replace=replace)
            write_plan(self.backend, work.records, work.ids, plan, self.manifest.stride)
            if plan.names:
                digest = files.add_digests(work.commit_record.ids_digest, list(plan.old.items()), sign=-1)
                work.commit(self.backend, files.add_digests(digest, list(plan.names.items())))
            if compaction.is_merge_due(work.records, work.ids, self.manifest.stride):
                self._merge(work)
        count = len(plan.records)
        return Appended(count, len(plan.names) - count if len(plan.names) > count else 0, plan.skipped, len(plan.old))

    def delete(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Remove ids at once; the next `compact` removes records that no id refers to.

        Returns:
            Ids that did not exist.
        """
        names = list(dict.fromkeys(ids))
        with self._writing() as work:
            found = keys_of(self.backend, partial(self._ids.rows, work.ids), names)
            remove(work.ids, "id", list(found))
            work.commit(self.backend, files.add_digests(work.commit_record.ids_digest, list(found.items()), sign=-1))
        return tuple(name for name in names if name not in found)

    def compact(self, *, purge: bool = False) -> None:
        """Remove deleted and orphaned records and merge data files, except versions that a reader has open.

        Reads every id and rewrites files with deletions. Small files are also merged by appends and `merge_small`.

        Args:
            purge: Remove the versions of readers too, which then move to the newest state, and keys from the indexes.
        """
        with self._writing() as work:
            compaction.remove_deleted(work.records, work.ids, rebuild=purge)
            self._clean(work, purge=purge)
            self._reader.forget()

    def merge_small(self, *, at_least: int = 2) -> bool:
        """Merge the small data files that appends have left, as appends do by themselves at a bound.

        Args:
            at_least: Number of small files from which they are merged.

        Returns:
            True if they were merged.
        """
        with self._writing() as work:
            due = compaction.is_merge_due(work.records, work.ids, self.manifest.stride, at_least)
            if due:
                self._merge(work)
        return due

    def rows(self, ids: Sequence[str], *, on_missing: OnMissing = "error") -> dict[str, Record]:
        """Return the stored record of each id: value, scale, tokens, loss, norm, truncated.

        Raises:
            MissingGradientError: If an id has no gradient and `on_missing` is "error".
            BankCorruptionError: If a record fails its checksum; names the ids.
        """
        return self._retried(partial(self._rows, ids, on_missing, None))

    def get(
        self,
        ids: Sequence[str],
        *,
        on_missing: OnMissing = "error",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Return gradients as a tensor [ids found, numbers]; `layout.split` splits it into tensors.

        Args:
            ids: Passages, in the order of the result; an id may occur repeatedly.
            on_missing: "error", or "skip" to omit missing ids.
            dtype: Type of the result; float32 by default.
            device: Device of the result.
        """
        import torch

        found = self.rows(ids, on_missing=on_missing)
        stacked = [self._numbers(found[name]) for name in ids if name in found]
        flat = np.stack(stacked) if stacked else np.zeros((0, self.layout.size), np.float32)  # [ids, numbers]
        return torch.as_tensor(np.array(flat)).to(device=device, dtype=dtype or torch.float32)

    def sum(
        self, weights: Mapping[str, float], *, on_missing: OnMissing = "error", device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Return the weighted sum Σ_i w_i g_i as a float32 tensor [numbers]; zeros for no passage.

        The result is bitwise independent of the order of the weights. Weights of ids with the same record are added.
        """
        kept = weights if on_missing == "error" else {name: weights[name] for name in self.keys(list(weights))}
        return self.sums([kept])[0].to(device)

    def sums(self, weights: Sequence[Mapping[str, float]], keys: dict[str, str] | None = None) -> torch.Tensor:
        """Return `sum` for several sets of weights with a single read, and with known `keys` of a pinned state."""
        import torch

        names = sorted({name for one in weights for name in one})
        found = self.rows(names) if keys is None else self._rows(names, "error", keys)
        result = torch.zeros(len(weights), self.layout.size, dtype=torch.float32)  # [sets, numbers]
        for into, own in zip(result, weights, strict=True):
            for row, weight in shared_weights(found, own):
                into += torch.as_tensor(np.array(self._numbers(row))) * weight  # [numbers]
        return result

    def stats(self) -> dict[str, Any]:
        """Return the number of ids, records and batches, and the size in bytes."""
        newest = self._newest()
        with files.reading(self.backend):
            return {
                "ids": newest.ids.count_rows(),
                "records": newest.records.count_rows(),
                "precision": self.precision,
                "numbers": self.layout.size,
                "bytes_per_record": self.manifest.stride,
                "bytes": self.backend.size(),
                "batches": len(newest.records.get_fragments()),
            }

    def _rows(self, ids: Sequence[str], on_missing: OnMissing, known: dict[str, str] | None) -> dict[str, Record]:
        names = list(dict.fromkeys(ids))
        keys = self.keys(names) if known is None else {name: known[name] for name in names if name in known}
        missing = [name for name in names if name not in keys]
        if missing and on_missing == "error":
            raise MissingGradientError(missing)
        records = self._reader.fetch(self.snapshot.records, list(dict.fromkeys(keys.values())), keys)
        return {name: records[keys[name]] for name in names if name in keys}

    def _retried(self, read: Callable[[], Result]) -> Result:
        """Result of a read, which is repeated if a compaction or an erasure has removed the files of the open state."""
        try:
            return read()
        except BankCorruptionError:
            if not self.refresh():
                raise
            return read()

    def _newest(self) -> Snapshot:
        if self.mode == "a" and not self._pins:
            self.refresh()
        return self.snapshot

    @contextmanager
    def _writing(self) -> Generator[Snapshot]:
        """Both datasets at their latest versions, under the writer lock."""
        if self.mode != "a":
            raise ConfigError(f"{self.backend} was opened for reading. Open it with mode 'a' to change it.")
        with self.backend.write_lock(self.lock_seconds), files.reading(self.backend):
            work = open_latest(self.backend)
            if work.ids.version > work.commit_record.ids_version:
                # a writer was killed between Lance's commit and the commit record: the batch is complete
                rows = work.ids.to_table(columns=["id", "key"]).to_pylist()
                work.commit(self.backend, files.add_digests("0", [(row["id"], row["key"]) for row in rows]))
            yield work
            self.snapshot = work

    def _merge(self, work: Snapshot) -> None:
        compaction.merge(work.records, work.ids, self.manifest.stride)
        self._clean(work)

    def _clean(self, work: Snapshot, *, purge: bool = False) -> None:
        faults.point("bank.compacted", str(self.backend))
        # committed before the old files are removed, so that a kill leaves either the old or the new state
        work.commit(self.backend, work.commit_record.ids_digest)
        for dataset in (work.records, work.ids):
            compaction.clean(dataset, self.backend.tag_lifetime, all_tags=purge)
        faults.point("bank.cleaned", str(self.backend))

    def _numbers(self, row: Mapping[str, Any]) -> FloatArray:
        return decode(row["value"], self.layout.size, self.precision, row["scale"])
