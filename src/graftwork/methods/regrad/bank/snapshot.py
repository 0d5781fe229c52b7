"""Open, committed versions of a bank's datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

from graftwork.core import faults
from graftwork.methods.regrad.bank import files
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import BankCorruptionError
from graftwork.methods.regrad.bank.files import IDS, RECORDS, CommitRecord

_ATTEMPTS = 5


@dataclass(eq=False)
class Snapshot:
    """Both datasets at the versions of a commit record."""

    commit_record: CommitRecord
    records: Any
    """Lance dataset of the records."""
    ids: Any
    """Lance dataset of the ids."""
    _untag: finalize[[Sequence[Any], str], Any] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, backend: Backend, *, tag: bool) -> Snapshot:
        """Open the last commit.

        A compaction that runs between reading the commit record and opening its versions is retried.

        Args:
            backend: Backend of the bank.
            tag: Protect the versions from clean-up until `close`, as readers need. Writers hold a lock instead.

        Raises:
            BankCorruptionError: If the committed versions are missing, or their row counts differ from the record.
        """
        failures = 0
        while True:
            commit_record = CommitRecord.read(backend)
            try:
                opened = cls(commit_record, *open_committed(backend, commit_record))
                if tag:
                    opened._tag(backend)
                with files.reading(backend):
                    counts = (opened.records.count_rows(), opened.ids.count_rows())
                break
            except BankCorruptionError:
                failures += 1
                if failures == _ATTEMPTS or CommitRecord.read(backend) == commit_record:
                    raise
        if counts != (commit_record.records, commit_record.ids):
            raise BankCorruptionError(
                f"{backend} holds {counts[0]} records and {counts[1]} ids; its commit record counts "
                f"{commit_record.records} and {commit_record.ids}. Restore it from a copy."
            )
        return opened

    def close(self) -> None:
        """Release the versions for clean-up."""
        if self._untag is not None:
            self._untag()
            self._untag = None

    def commit(self, backend: Backend, digest: str) -> None:
        """Make the present versions durable, and then the newest state.

        Args:
            backend: Backend of the bank, whose lock the caller holds.
            digest: Digest of the ids.
        """
        backend.sync()
        faults.point("bank.synced", str(backend))
        backend.check_lock()
        counts = (self.records.count_rows(), self.ids.count_rows())
        self.commit_record = CommitRecord(self.records.version, self.ids.version, *counts, digest)
        self.commit_record.write(backend)
        faults.point("bank.committed", str(backend))

    def _tag(self, backend: Backend) -> None:
        datasets = (self.records, self.ids)
        name = files.tag_versions(backend, datasets)
        if name is not None:
            # also removes the tag of a reader that is not closed
            self._untag = finalize(self, files.untag_versions, datasets, name)


def open_committed(backend: Backend, commit_record: CommitRecord) -> tuple[Any, Any]:
    """Open records and ids at the versions of a commit record.

    Raises:
        BankCorruptionError: If a version is missing or unreadable.
    """
    return (
        files.open_dataset(backend, RECORDS, commit_record.records_version),
        files.open_dataset(backend, IDS, commit_record.ids_version),
    )


def open_latest(backend: Backend) -> Snapshot:
    """Open both datasets at their latest versions, for a writer that holds the lock.

    Raises:
        BankCorruptionError: If acknowledged data is missing.
    """
    committed = CommitRecord.read(backend)
    open_committed(backend, committed)
    records, ids = (files.open_dataset(backend, name) for name in (RECORDS, IDS))
    if records.version < committed.records_version or ids.version < committed.ids_version:
        raise BankCorruptionError(f"{backend} is older than its commit record. Restore it from a copy.")
    return Snapshot(committed, records, ids)
