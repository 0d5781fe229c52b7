"""Comparisons of a graft with the dense model, sorted into gains and costs by their sign."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

from graftwork.metrics.answers import paired_bootstrap
from graftwork.metrics.results import CostRow, Results

MIB = 2**20


class Verdict(Enum):
    """Outcome of a comparison."""

    GAIN = "Better than dense"
    COST = "Worse than dense"
    UNCLEAR = "No clear difference"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measured number of a graft beside the same number of the dense model."""

    name: str
    dense: float
    graft: float
    unit: str
    size: int
    """Number of measurements, n."""
    counted: str
    """Plural noun of what `size` counts, such as questions; the whole phrase if `size` is 1."""
    higher_is_better: bool
    interval: tuple[float, float] | None = None
    """Interval of the difference graft − dense: 95 % over questions, or the range over runs; None for exact numbers."""
    baseline: str = "dense"
    """Name of the baseline."""

    @property
    def difference(self) -> float:
        """Difference graft − dense."""
        return self.graft - self.dense

    @property
    def ratio(self) -> float:
        """Quotient graft / dense; NaN if the dense number is 0."""
        return self.graft / self.dense if self.dense else math.nan

    @property
    def verdict(self) -> Verdict:
        """Gain or cost by the sign of the difference; unclear if its interval contains zero or is not finite."""
        low, high = self.interval or (self.difference, self.difference)
        if not (low > 0 or high < 0) or not math.isfinite(low + high):
            return Verdict.UNCLEAR
        return Verdict.GAIN if (low > 0) == self.higher_is_better else Verdict.COST

    @property
    def change(self) -> str:
        """Formatted difference with its interval."""
        unit = "points" if self.unit == "%" else self.unit
        return f"{_signed(self.difference, self.unit)} {unit}".rstrip() + self._interval

    @property
    def text(self) -> str:
        """Sentence with both numbers, the difference, its interval and n."""
        counted = f"n = {self.size} {self.counted}" if self.size > 1 else self.counted
        factor = "" if self.unit == "%" or not math.isfinite(self.ratio) else f" ({self.ratio:.2f}×)"
        return (
            f"{self.name}: {_number(self.graft, self.unit)}{factor}, {self.baseline} {_number(self.dense, self.unit)}; "
            f"difference {self.change}, {counted}"
        )

    @property
    def _interval(self) -> str:
        if self.interval is None:
            return ""
        low, high = self.interval
        return f" [{_signed(low, self.unit)}, {_signed(high, self.unit)}]"


def compare_scores(
    name: str,
    dense: Mapping[str, float],
    graft: Mapping[str, float],
    counted: str,
    *,
    unit: str = "%",
    higher_is_better: bool = True,
    baseline: str = "dense",
) -> Comparison:
    """Compare scores of the same examples, with the 95 % interval of a paired bootstrap.

    Args:
        name: Name of the score.
        dense: Score of every example by its id, for the dense model.
        graft: Score of every example by its id, for the graft.
        counted: Plural noun of the examples.
        unit: Unit of the scores.
        higher_is_better: True if a higher score is better.
        baseline: Name of the baseline.
    """
    shared = sorted(set(dense) & set(graft))
    ours, theirs = [graft[key] for key in shared], [dense[key] for key in shared]
    found = paired_bootstrap(ours, theirs)
    size = len(shared)
    return Comparison(
        name,
        sum(theirs) / size,
        sum(ours) / size,
        unit,
        size,
        counted,
        higher_is_better,
        (found["low"], found["high"]),
        baseline,
    )


def compare_times(name: str, dense: Sequence[float], graft: Sequence[float], *, baseline: str = "dense") -> Comparison:
    """Compare seconds of interleaved runs by their medians; the interval is the range of all differences.

    Args:
        name: Name of the measurement.
        dense: Seconds of the dense model: of all runs, or their median, minimum and maximum.
        graft: Seconds of the graft, likewise.
        baseline: Name of the baseline.
    """
    low, high = min(graft) - max(dense), max(graft) - min(dense)
    return Comparison(
        name,
        1000 * median(dense),
        1000 * median(graft),
        "ms",
        len(graft),
        "runs of each",
        False,
        (1000 * low, 1000 * high),
        baseline,
    )


def longest(results: Results) -> int:
    """Greatest length of the measured costs."""
    return max(row.length for row in results.cost)


def compare_costs(results: Results, dense: str, graft: str) -> tuple[Comparison, Comparison]:
    """Compare latency, and memory saved for the backward pass, of two settings at the greatest length."""
    length = longest(results)
    rows = {row.label: row for row in results.cost if row.length == length}
    one, other = rows[dense], rows[graft]
    time = compare_times(f"forward pass of {length} tokens, {graft}", list(_latencies(one)), list(_latencies(other)))
    memory = Comparison(
        f"memory saved for backward at {length} tokens, {graft}",
        one.saved_bytes / MIB,
        other.saved_bytes / MIB,
        "MiB",
        1,
        "counted exactly",
        higher_is_better=False,
    )
    return time, memory


def _latencies(row: CostRow) -> Iterator[float]:
    seconds = row.seconds if row.forward_seconds is None else row.forward_seconds
    low, high = row.forward_range or (seconds, seconds)
    yield from (low, *[seconds] * max(1, row.rounds - 2), high)


def sorted_by_verdict(comparisons: Sequence[Comparison]) -> dict[Verdict, list[Comparison]]:
    """Group comparisons by verdict: gains, costs, and those without a clear difference."""
    return {verdict: [one for one in comparisons if one.verdict is verdict] for verdict in Verdict}


def _number(value: float, unit: str) -> str:
    shown = f"{value:.1f}" if unit == "%" or abs(value) >= 100 else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def _signed(value: float, unit: str) -> str:
    """Difference with its sign; those of percentages are points."""
    size = abs(value)
    shown = f"{size:.1f}" if unit == "%" or size >= 100 else f"{size:.3g}"
    sign = "−" if value < 0 else "+" if value > 0 else ""
    return sign + shown
