"""Metrics of classification tasks, on predicted class names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from graftwork.errors import DataError
from graftwork.metrics.metric import Metric

if TYPE_CHECKING:
    from graftwork.core.example import Example, Examples


def accuracy(predictions: Sequence[str], examples: Examples) -> float:
    """Percentage of rows with the right class; rows that could not be parsed count as wrong."""
    right = sum(text.strip() == _label(row) for text, row in zip(predictions, examples.rows, strict=True))
    if examples.size < 1:
        raise DataError("Found no example to score; expected at least one.")
    return 100.0 * right / examples.size


def class_f1(positive: str) -> Callable[[Sequence[str], Examples], float]:
    """Create the F1 metric of one class: 100 · 2·hits / (predicted + expected); 0 if the class does not occur.

    Args:
        positive: Name of the positive class.
    """

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        pairs = [(text.strip(), _label(row)) for text, row in zip(predictions, examples.rows, strict=True)]
        hits = sum(predicted == expected == positive for predicted, expected in pairs)
        either = sum((predicted == positive) + (expected == positive) for predicted, expected in pairs)
        return 200.0 * hits / either if either else 0.0

    return compute


def _label(row: Example) -> str:
    if not row.answers:
        raise DataError(f"Found no class for example {row.key}; expected one to score against.")
    return row.answers[0]


ACCURACY = Metric("accuracy", accuracy, description="share of rows with the right class")
