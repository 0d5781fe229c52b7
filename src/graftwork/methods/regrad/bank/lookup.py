"""Lookup of rows by the value of a column: the index of a Lance dataset, and a map of the rows added since.

Lance scans every fragment that its index does not cover, about 2 ms each, and rewrites the whole index to cover one
more. The map holds the addresses of the rows in those fragments, so that a lookup costs the same after any number of
small additions; only fragments that are new or have new deletions are read to update it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from graftwork.methods.regrad.bank import files

INDEX_ROWS = 65_536
"""Number of rows outside the index that triggers an update of the index; bounds the map."""
_FRAGMENT_BITS = 32
"""Bits of a row address below the number of its fragment."""


@dataclass(eq=False)
class Lookup:
    """Rows of a dataset by the value of one column, whose values differ.

    An object serves all versions of one dataset; it keeps no row, only addresses.
    """

    column: str
    _seen: dict[int, tuple[str, int]] = field(default_factory=dict[int, tuple[str, int]])
    """Fragment to its file and number of deletions."""
    _values: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    """Fragment to the values in it."""
    _addresses: dict[str, int] = field(default_factory=dict[str, int])
    """Value to the address of its row."""
    _lock: Any = field(default_factory=Lock, repr=False)
    _covered: tuple[int, frozenset[int]] = (-1, frozenset())
    """Version of the dataset, and the fragments that its index covers."""

    def rows(self, dataset: Any, values: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows of these values, in arbitrary order; missing values have no row.

        Args:
            dataset: Lance dataset, at any version.
            values: Values of the column.
            columns: Columns of the rows.
        """
        if not values:
            return []
        version, covered = self._covered
        if version != dataset.version:
            covered = frozenset(indexed_fragments(dataset))
            self._covered = (dataset.version, covered)
        outside = {one.fragment_id: one for one in dataset.get_fragments() if one.fragment_id not in covered}
        if not covered:
            return list(files.rows_where(dataset, self.column, values, columns))
        with self._lock:
            self._update(dataset, outside)
            found = {value: self._addresses[value] for value in values if value in self._addresses}
        rest = [value for value in values if value not in found]
        rows: list[dict[str, Any]] = []
        if found:
            rows += dataset._take_rows(list(found.values()), columns=list(columns)).to_pylist()
        for condition in files.conditions(self.column, rest):
            # fast_search leaves out the fragments that the index does not cover
            scanner = dataset.scanner(columns=list(columns), filter=condition, fast_search=True)
            rows += scanner.to_table().to_pylist()
        return rows

    def _update(self, dataset: Any, outside: Mapping[int, Any]) -> None:
        state = {number: (one.metadata.files[0].path, one.num_deletions) for number, one in outside.items()}
        stale = [number for number, known in self._seen.items() if state.get(number) != known]
        for number in stale:
            del self._seen[number]
            for value in self._values.pop(number):
                if self._addresses.get(value, -1) >> _FRAGMENT_BITS == number:
                    del self._addresses[value]
        fresh = [one for number, one in outside.items() if number not in self._seen]
        if not fresh:
            return
        table = dataset.scanner(columns=[self.column], fragments=fresh, with_row_address=True).to_table()
        for one in fresh:
            self._seen[one.fragment_id] = state[one.fragment_id]
            self._values[one.fragment_id] = []
        for value, address in zip(table[self.column].to_pylist(), table["_rowaddr"].to_pylist(), strict=True):
            self._values[address >> _FRAGMENT_BITS].append(value)
            self._addresses[value] = address


def indexed_fragments(dataset: Any) -> set[int]:
    """Return the numbers of the fragments that the index of a dataset covers; empty without an index."""
    covered: set[int] = set()
    for described in dataset.describe_indices():
        for part in described.segments:
            covered.update(part.fragment_ids)
    return covered


def is_index_due(dataset: Any) -> bool:
    """True if the index lacks so many rows that it should be updated."""
    covered = indexed_fragments(dataset)
    outside = (one.physical_rows for one in dataset.get_fragments() if one.fragment_id not in covered)
    return sum(outside) > INDEX_ROWS
