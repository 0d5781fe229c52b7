"""Set of 64-bit numbers in eight bytes each, for the ids of a large corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECENT = 65_536
"""Number of entries that are kept in a Python set, which takes about 70 bytes each, before they are sorted."""


class CompactIds:
    """Set of numbers below 2⁶⁴ that grows: sorted arrays of at least doubling size, and a small set of recent ones.

    Eight bytes per number, and twice as many while two arrays are merged.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[NDArray[np.uint64]] = []

    def __len__(self) -> int:
        return len(self._recent) + sum(len(part) for part in self._sorted)

    def add(self, number: int) -> bool:
        """Add a number. Return False if the set contains it."""
        if number in self._recent or (self._sorted and self._is_sorted_in(number)):
            return False
        self._recent.add(number)
        if len(self._recent) >= RECENT:
            self._sort()
        return True

    def _is_sorted_in(self, number: int) -> bool:
        import numpy as np

        wanted = np.uint64(number)
        for part in self._sorted:
            at = int(part.searchsorted(wanted))
            if at < len(part) and part[at] == wanted:
                return True
        return False

    def _sort(self) -> None:
        import numpy as np

        part = np.fromiter(self._recent, np.uint64, len(self._recent))
        self._recent = set()
        part.sort()
        # arrays of similar size become one, so that their number grows with the logarithm of the entries
        while self._sorted and len(self._sorted[-1]) < 2 * len(part):
            part = np.concatenate([self._sorted.pop(), part])
            part.sort(kind="stable")
        self._sorted.append(part)
