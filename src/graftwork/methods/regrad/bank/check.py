"""Full verification of a bank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graftwork.methods.regrad.bank import files
from graftwork.methods.regrad.bank.errors import BankCorruptionError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import ID_COLUMNS, VALUE_COLUMNS, name_checksum, record_checksum

ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Verified:
    """Result of a verification."""

    ids: int
    """Number of ids read."""
    records: int
    """Number of records read."""
    bad_ids: tuple[str, ...]
    """Ids that are damaged, or whose gradient is damaged or missing."""
    problems: tuple[str, ...]
    """Descriptions of all other problems."""

    @property
    def whole(self) -> bool:
        """True if the bank has no problem."""
        return not self.bad_ids and not self.problems


def verify(bank: GradientBank) -> Verified:
    """Read every id and every record of the bank's open state, and compare all checksums and counts."""
    problems: list[str] = []
    names: dict[str, str] = {}
    bad: set[str] = set()
    for row in _rows(bank, bank.snapshot.ids, ID_COLUMNS, problems):
        if row["checksum"] != name_checksum(row["id"], row["key"]):
            bad.add(row["id"])
        elif row["id"] in names:
            problems.append(f"id {row['id']!r} occurs twice")
        names[row["id"]] = row["key"]
    good: dict[str, bool] = {}
    for row in _rows(bank, bank.snapshot.records, VALUE_COLUMNS, problems):
        if row["key"] in good:
            problems.append(f"record {row['key']} occurs twice")
        good[row["key"]] = row["checksum"] == record_checksum(row)
    bad |= {name for name, key in names.items() if not good.get(key, False)}
    digest = files.add_digests("0", list(names.items()))
    if digest != bank.commit_record.ids_digest and not bad:
        problems.append("the ids differ from those in the commit record")
    return Verified(len(names), len(good), tuple(sorted(bad)), tuple(problems))


def _rows(bank: GradientBank, dataset: Any, columns: tuple[str, ...], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield rows file by file, so that only the rows of an unreadable file are lost."""
    for fragment in dataset.get_fragments():
        try:
            with files.reading(bank.backend, *(file.path for file in fragment.data_files())):
                for batch in fragment.to_batches(columns=list(columns), batch_size=ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        except BankCorruptionError as error:
            problems.append(str(error))
