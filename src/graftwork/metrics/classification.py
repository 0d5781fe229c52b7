"""Scores of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from graftwork.errors import DataError


def accuracy(targets: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """100 × the share of exactly equal labels.

    Raises:
        DataError: If there are none, or not one for each.
    """
    if len(targets) != len(predictions) or not targets:
        raise DataError(f"Found {len(predictions)} labels for {len(targets)} targets; expected one for each.")
    return 100 * sum(target == label for target, label in zip(targets, predictions, strict=True)) / len(targets)


def f1a(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """F1 over all answer options of MultiRC; a label that is neither "True" nor "False" counts as the wrong one.

    Source: Khashabi et al. 2018, as Narang et al. 2020 report it, which no task of their code computes.
    """
    right = wrong = missed = 0
    for target, label in zip(targets, predictions, strict=True):
        truth = target == "True"
        said = label == "True" if label in ("True", "False") else not truth
        right += truth and said
        wrong += said and not truth
        missed += truth and not said
    return 100 * 2 * right / (2 * right + wrong + missed) if right else 0.0


def accuracy_by_class(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Accuracy among the examples of each class, by class."""
    size, right = Counter(targets), Counter()
    for target, label in zip(targets, predictions, strict=True):
        right[target] += target == label
    return {name: 100 * right[name] / count for name, count in size.items()}
