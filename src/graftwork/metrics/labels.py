"""Scores of predicted classes, by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from graftwork.errors import DataError
from graftwork.metrics.metric import Metric

if TYPE_CHECKING:
    from graftwork.core.example import Examples


def accuracy(predictions: Sequence[str], examples: Examples) -> float:
    """100 × the share of rows whose predicted class is the right one; rows that could not be read count as wrong."""
    right = sum(text.strip() == _label(row) for text, row in zip(predictions, examples.rows, strict=True))
    if examples.size < 1:
        raise DataError("Found no example to score; expected at least one.")
    return 100.0 * right / examples.size


def class_f1(positive: str) -> Callable[[Sequence[str], Examples], float]:
    """Make the F1 score of one class: 100 × 2·hits / (predicted + expected); 0 if it is neither.

    Args:
        positive: The class that counts.
    """

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        pairs = [(text.strip(), _label(row)) for text, row in zip(predictions, examples.rows, strict=True)]
        hits = sum(predicted == expected == positive for predicted, expected in pairs)
        either = sum((predicted == positive) + (expected == positive) for predicted, expected in pairs)
        return 200.0 * hits / either if either else 0.0

    return compute


def _label(row: object) -> str:
    answers: tuple[str, ...] = getattr(row, "answers", ())
    if not answers:
        raise DataError(f"Found no class for example {getattr(row, 'key', '?')}; expected one to score against.")
    return answers[0]


ACCURACY = Metric("accuracy", accuracy, description="share of rows with the right class")
