"""Scores of short answers as open-domain question answering publishes them, with their uncertainty."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.errors import DataError
from graftwork.metrics.metric import Metric

if TYPE_CHECKING:
    from graftwork.core.example import Examples

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = frozenset({"yes", "no", "noanswer"})

DRAWS = 1000
"""Resamplings of a bootstrap."""


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """How one text compares with the best of its gold answers; each from 0 to 1."""

    exact_match: float = 0.0
    f1: float = 0.0
    precision: float = 0.0
    recall: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Means over a group of questions, in percent, rounded to two decimals as they are published."""

    exact_match: float
    f1: float
    precision: float
    recall: float
    size: int
    """Questions that the means are over."""
    missing: int
    """Questions without a prediction."""
    f1_interval: tuple[float, float]
    """Where the mean F1 lies in 95 % of bootstrap samples."""


def normalize_short_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles unless the whole text is the letter "a", single spaces.

    Source: the answer normalisation of `oneal2000/ReGrad`, which keeps the letter of a multiple-choice answer.

    Example:
        >>> normalize_short_answer("A."), normalize_short_answer("an U.S.A. apple")
        ('a', 'usa apple')
    """
    bare = text.lower().translate(_PUNCTUATION)
    kept = bare if bare.strip() == "a" else _ARTICLES.sub(" ", bare)
    return " ".join(kept.split())


def score_answer(prediction: str, answers: Sequence[str]) -> AnswerScore:
    """Compare a text with gold answers: the best exact match, and precision and recall of the answer with the best F1.

    A yes, no or noanswer on either side that the other does not share scores 0. Two texts without any word match
    exactly and have F1 0, which published numbers contain.

    Raises:
        DataError: If there is no gold answer.
    """
    if not answers:
        raise DataError("Found no gold answer to score against; expected at least one.")
    predicted = normalize_short_answer(prediction)
    golds = [normalize_short_answer(answer) for answer in answers]
    best = max((_overlap(predicted, gold) for gold in golds), key=lambda triple: triple[0])
    return AnswerScore(float(predicted in golds), *best)


def _overlap(predicted: str, gold: str) -> tuple[float, float, float]:
    """F1, precision and recall over words with their multiplicity."""
    if predicted != gold and (predicted in _CLOSED or gold in _CLOSED):
        return 0.0, 0.0, 0.0
    left, right = predicted.split(), gold.split()
    common = sum((Counter(left) & Counter(right)).values())
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall), precision, recall


def score_group(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], *, missing_is_wrong: bool = True
) -> GroupScore:
    """Score predictions against gold answers, both by the question's id.

    Args:
        predictions: Id to text; ids are texts, also where they look like numbers.
        answers: Id to gold answers.
        missing_is_wrong: Count a question without prediction as wrong; else leave it out of the means.

    Raises:
        DataError: If a prediction has no question, or nothing is left to score.
    """
    if unknown := [name for name in predictions if name not in answers]:
        raise DataError(
            f"Found predictions for {len(unknown)} unknown questions, such as {unknown[0]!r}; expected ids of the data "
            "set. Score them against the file that they were made from."
        )
    missing = [name for name in answers if name not in predictions]
    scored = [score_answer(predictions[name], gold) for name, gold in answers.items() if name in predictions]
    scored += [AnswerScore()] * (len(missing) if missing_is_wrong else 0)
    if not scored:
        raise DataError("Found no prediction to score; expected at least one.")

    def mean(name: str) -> float:
        return round(100 * sum(getattr(score, name) for score in scored) / len(scored), 2)

    names = ("exact_match", "f1", "precision", "recall")
    interval = bootstrap_interval([score.f1 for score in scored])
    return GroupScore(
        *(mean(name) for name in names),
        size=len(scored),
        missing=len(missing),
        f1_interval=(round(100 * interval[0], 2), round(100 * interval[1], 2)),
    )


def macro_average(groups: Mapping[str, GroupScore]) -> dict[str, float]:
    """The unweighted means of the groups' rounded scores."""
    names = ("exact_match", "f1", "precision", "recall")
    return {name: round(sum(getattr(group, name) for group in groups.values()) / len(groups), 2) for name in names}


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the means of resampled values."""
    import numpy as np

    means = _resampled(np.asarray(values, dtype=np.float64), seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Compare two systems on the same questions by resampling the questions.

    Returns:
        The mean `difference`, the ends `low` and `high` of its 95 % interval, and `p_value`: twice the share of samples
        in which the difference has the other sign or is none.

    Raises:
        DataError: If the two do not answer the same number of questions.
    """
    import numpy as np

    if len(ours) != len(theirs) or not ours:
        raise DataError(f"Found {len(ours)} and {len(theirs)} scores; expected as many, of the same questions.")
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    means = _resampled(differences, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(differences.mean())
    other = float((means <= 0).mean() if mean > 0 else (means >= 0).mean())
    return {"difference": mean, "low": float(low), "high": float(high), "p_value": min(1.0, 2 * other)}


def _resampled(values: Any, seed: int) -> Any:
    import numpy as np

    draw = np.random.default_rng(seed)
    # one row of indices at a time: a matrix of all draws over a large set would not fit
    return np.array([values[draw.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)])


def _mean_of(name: str) -> Callable[[Sequence[str], Examples], float]:
    def compute(predictions: Sequence[str], examples: Examples) -> float:
        if examples.size < 1:
            raise DataError("Found no example to score; expected at least one.")
        pairs = zip(predictions, examples.rows, strict=True)
        return 100 * sum(getattr(score_answer(text, row.answers), name) for text, row in pairs) / examples.size

    return compute


ANSWER_EXACT_MATCH = Metric("exact_match", _mean_of("exact_match"), description="exact match, best over answers")
ANSWER_F1 = Metric("f1", _mean_of("f1"), description="word F1, best over answers; yes and no match exactly or not")
ANSWER_PRECISION = Metric("precision", _mean_of("precision"), description="word precision of the best answer")
ANSWER_RECALL = Metric("recall", _mean_of("recall"), description="word recall of the best answer")
