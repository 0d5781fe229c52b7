"""Reading a whole bank again to find out whether it is what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graftwork.methods.regrad.bank import files as disk
from graftwork.methods.regrad.bank.errors import BankCorruptionError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import ID_COLUMNS, VALUE_COLUMNS, name_checksum, record_checksum

ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Verified:
    """What is wrong with a bank."""

    ids: int
    """Ids looked at."""
    records: int
    """Records that could be read."""
    bad_ids: tuple[str, ...]
    """Ids whose gradient is damaged or gone, or that are damaged themselves."""
    problems: tuple[str, ...]
    """What else is wrong, in words."""

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad_ids and not self.problems


def verify(bank: GradientBank) -> Verified:
    """Read every name and every record of the state that the bank has open, and compare all checksums and counts."""
    problems: list[str] = []
    names: dict[str, str] = {}
    bad: set[str] = set()
    for row in _rows(bank, bank._ids, ID_COLUMNS, problems):
        if row["checksum"] != name_checksum(row["id"], row["key"]):
            bad.add(row["id"])
        elif row["id"] in names:
            problems.append(f"id {row['id']!r} is there twice")
        names[row["id"]] = row["key"]
    good: dict[str, bool] = {}
    for row in _rows(bank, bank._records, VALUE_COLUMNS, problems):
        if row["key"] in good:
            problems.append(f"record {row['key']} is there twice")
        good[row["key"]] = row["checksum"] == record_checksum(row)
    bad |= {name for name, key in names.items() if not good.get(key, False)}
    digest = disk.add_digests("0", list(names.items()))
    if digest != bank.seal.ids_digest and not bad:
        problems.append("the ids are not those that the seal counts")
    return Verified(len(names), len(good), tuple(sorted(bad)), tuple(problems))


def _rows(bank: GradientBank, dataset: Any, columns: tuple[str, ...], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one data file after the other, so that a broken one costs its own rows only."""
    for fragment in dataset.get_fragments():
        try:
            with disk.reading(bank.backend, *(file.path for file in fragment.data_files())):
                for batch in fragment.to_batches(columns=list(columns), batch_size=ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        except BankCorruptionError as error:
            problems.append(str(error))
