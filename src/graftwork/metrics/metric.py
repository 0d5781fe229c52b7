"""What a metric is: a name, a function of predictions and examples, and the direction that is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.core.example import Examples


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that says how good predictions are.

    Example:
        >>> Metric("share_parsed", lambda predictions, examples: 100 * sum(map(bool, predictions)) / examples.size)
    """

    name: str
    compute: Callable[[Sequence[Any], Examples], float]
    """Maps parsed predictions, aligned with the rows of the examples, to the score; NaN where it is undefined."""
    higher_is_better: bool = True
    description: str = ""


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Several numbers that come out of one computation over the same predictions."""

    names: tuple[str, ...]
    """Names of the numbers, in the order to show them."""
    compute: Callable[[Sequence[Any], Examples], Mapping[str, float]]
    """Maps parsed predictions, aligned with the rows of the examples, to the numbers; NaN where one is undefined."""
    lower_is_better: frozenset[str] = frozenset()
    """Names of numbers of which less is better."""
    note: Callable[[], str] | None = None
    """Says with which configuration the numbers were made, to be printed beside them."""
