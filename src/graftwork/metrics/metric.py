"""Definition of a metric: name, function of predictions and examples, and better direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.core.example import Examples


@dataclass(frozen=True, slots=True)
class Metric:
    """Metric that yields one number.

    Example:
        >>> Metric("share_parsed", lambda predictions, examples: 100 * sum(map(bool, predictions)) / examples.size)
    """

    name: str
    compute: Callable[[Sequence[Any], Examples], float]
    """Parsed predictions, aligned with the rows of the examples → score; NaN if undefined."""
    higher_is_better: bool = True
    description: str = ""


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metric that yields several numbers from one computation."""

    names: tuple[str, ...]
    """Names of the numbers, in display order."""
    compute: Callable[[Sequence[Any], Examples], Mapping[str, float]]
    """Parsed predictions, aligned with the rows of the examples → number by name; NaN if undefined."""
    lower_is_better: frozenset[str] = frozenset()
    """Names of the numbers for which lower is better."""
    note: Callable[[], str] | None = None
    """Returns the configuration of the metric, such as sacrebleu's signature, to be reported with the numbers."""
