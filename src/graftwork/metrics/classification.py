"""Accuracy and F1 of labels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from graftwork.errors import DataError


def accuracy(targets: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Percentage of predictions equal to their target.

    Raises:
        DataError: If there is no target, or the numbers of targets and predictions differ.
    """
    if len(targets) != len(predictions) or not targets:
        raise DataError(f"Found {len(predictions)} labels for {len(targets)} targets; expected one for each.")
    return 100 * sum(target == label for target, label in zip(targets, predictions, strict=True)) / len(targets)


def f1a(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """F1a of MultiRC in percent: F1 of the class "True" over all answer options, 2·TP / (2·TP + FP + FN).

    A prediction that is neither "True" nor "False" counts as the wrong one.

    Source: Khashabi et al. 2018; reported by Narang et al. 2020, although no task of their code computes it.
    """
    true_positives = false_positives = false_negatives = 0
    for target, label in zip(targets, predictions, strict=True):
        truth = target == "True"
        predicted = label == "True" if label in ("True", "False") else not truth
        true_positives += truth and predicted
        false_positives += predicted and not truth
        false_negatives += truth and not predicted
    errors = false_positives + false_negatives
    return 100 * 2 * true_positives / (2 * true_positives + errors) if true_positives else 0.0
