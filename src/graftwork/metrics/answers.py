"""Short-answer metrics of open-domain question answering, with bootstrap intervals."""

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
    import numpy as np
    from numpy.typing import NDArray

    from graftwork.core.example import Examples

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = frozenset({"yes", "no", "noanswer"})

BOOTSTRAP_SAMPLES = 1000
"""Number of bootstrap samples."""


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Scores of one text against the best of its gold answers, each in [0, 1]."""

    exact_match: float = 0.0
    f1: float = 0.0
    precision: float = 0.0
    recall: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Mean scores of a group of questions, in percent, rounded to two decimals as published."""

    exact_match: float
    f1: float
    precision: float
    recall: float
    size: int
    """Number of scored questions."""
    missing: int
    """Number of questions without a prediction."""
    f1_interval: tuple[float, float]
    """95 % bootstrap interval of the mean F1."""


def normalize_short_answer(text: str) -> str:
    """Normalise a short answer: lower case, no ASCII punctuation, no articles, single spaces.

    The articles are kept if the whole text is the letter "a", the label of a multiple-choice option.

    Source: the answer normalisation of `oneal2000/ReGrad`.

    Example:
        >>> normalize_short_answer("A."), normalize_short_answer("an U.S.A. apple")
        ('a', 'usa apple')
    """
    bare = text.lower().translate(_PUNCTUATION)
    # compared before white space is collapsed, as in the original: "a ." becomes ""
    kept = bare if bare == "a" else _ARTICLES.sub(" ", bare)
    return " ".join(kept.split())


def score_answer(prediction: str, answers: Sequence[str]) -> AnswerScore:
    """Score a text against gold answers: best exact match, and precision, recall and F1 of the answer with the best F1.

    If either text is yes, no or noanswer, the score is 0 unless both are equal. Two empty texts match exactly but have
    F1 0, as in the published numbers.

    Raises:
        DataError: If `answers` is empty.
    """
    if not answers:
        raise DataError("Found no gold answer to score against; expected at least one.")
    predicted = normalize_short_answer(prediction)
    golds = [normalize_short_answer(answer) for answer in answers]
    best = max((_overlap(predicted, gold) for gold in golds), key=lambda triple: triple[0])
    return AnswerScore(float(predicted in golds), *best)


def _overlap(predicted: str, gold: str) -> tuple[float, float, float]:
    """F1 = 2·P·R / (P + R), precision P and recall R over the multisets of words."""
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
    """Score predictions against gold answers, both keyed by question id.

    Args:
        predictions: Question id → text; ids are strings, including numeric ones.
        answers: Question id → gold answers.
        missing_is_wrong: Count questions without a prediction as wrong instead of excluding them from the means.

    Raises:
        DataError: If a prediction has no question, or no question is scored.
    """
    if unknown := [name for name in predictions if name not in answers]:
        raise DataError(
            f"Found predictions for {len(unknown)} unknown questions, such as {unknown[0]!r}; expected ids of the data "
            "set. Score them against the file that they were generated from."
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
    """Unweighted means of the rounded scores of the groups."""
    names = ("exact_match", "f1", "precision", "recall")
    return {name: round(sum(getattr(group, name) for group in groups.values()) / len(groups), 2) for name in names}


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    import numpy as np

    means = _resampled(np.asarray(values, dtype=np.float64), seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    ours: Sequence[Any],
    theirs: Sequence[Any],
    *,
    aggregate: Callable[[Sequence[Any]], float] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Paired bootstrap test of two systems on the same questions.

    Args:
        ours: One score for each question.
        theirs: Scores of the other system.
        aggregate: Score of a system from those of its questions, which are any values then; the mean by default.
        seed: Seed of the bootstrap samples.

    Returns:
        The mean `difference`, the ends `low` and `high` of its 95 % interval, and `p_value`: twice the share of
        bootstrap samples whose mean difference is zero or has the opposite sign.

    Raises:
        DataError: If the two systems have different numbers of scores, or none.
    """
    import numpy as np

    if len(ours) != len(theirs) or not ours:
        raise DataError(f"Found {len(ours)} and {len(theirs)} scores; expected one score of each for every question.")
    if aggregate is None:
        differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
        means, mean = _resampled(differences, seed), float(differences.mean())
    else:
        generator = np.random.default_rng(seed)
        drawn = (generator.integers(0, len(ours), len(ours)).tolist() for _ in range(BOOTSTRAP_SAMPLES))
        means = np.array([aggregate([ours[i] for i in row]) - aggregate([theirs[i] for i in row]) for row in drawn])
        mean = float(aggregate(ours) - aggregate(theirs))
    low, high = np.percentile(means, [2.5, 97.5])
    other = float((means <= 0).mean() if mean > 0 else (means >= 0).mean())
    return {"difference": mean, "low": float(low), "high": float(high), "p_value": min(1.0, 2 * other)}


def _resampled(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of bootstrap samples of the values [questions] → [samples]."""
    import numpy as np

    generator = np.random.default_rng(seed)
    # one sample at a time: the index matrix of all samples [samples questions] would not fit into memory
    return np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(BOOTSTRAP_SAMPLES)])


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
