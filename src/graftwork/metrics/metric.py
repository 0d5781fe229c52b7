"""What a metric is: a name, a function of predictions and examples, and the direction that is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.tasks.task import Examples


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
