"""Leakage-adjusted simulatability: whether explanations help a simulator to predict a model's labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from graftwork.errors import MissingExtraError

FOLDS = 5
"""Number of folds; the simulator predicts each fold after training on the others."""
LEAST = 2 * FOLDS
"""Number of answers below which no simulator is trained."""
NAN = float("nan")
Simulator = Callable[[Sequence[str], Sequence[str]], list[str]]
"""Function from inputs and explanations to labels."""


class Simulatability(NamedTuple):
    """Scores of a simulator, in percent; NaN where they are undefined."""

    las: float
    """Mean of the differences in both groups, each of which counts half; NaN if a group is empty."""
    leaking: float
    """accuracy(x, e) − accuracy(x) on the answers whose label the simulator predicts from e alone."""
    nonleaking: float
    """The same difference on all other answers."""
    leaked_rate: float
    """Share of answers whose label the simulator predicts from e alone."""
    accuracy: float
    """Share of labels that the simulator predicts from input and explanation."""
    accuracy_without: float
    """Share of labels that the simulator predicts from the input alone."""


def leakage_adjusted(with_both: Sequence[bool], with_input: Sequence[bool], with_reason: Sequence[bool]) -> tuple[
    float, float, float
]:  # fmt: skip
    """Return LAS and its two terms, in percent.

    LAS_k = mean over the answers with leak k of 1[ŷ | x, e] − 1[ŷ | x],  LAS = (LAS_0 + LAS_1) / 2,  k = 1[ŷ | e]

    Source: Hase et al. 2020, "Leakage-Adjusted Simulatability"; `compute_sim.py` of `peterbhase/LAS-NL-Explanations`.

    Args:
        with_both: True for each label that is predicted from input x and explanation e.
        with_input: True for each label that is predicted from x alone.
        with_reason: True for each label that is predicted from e alone.

    Returns:
        LAS, LAS_1 (leaking) and LAS_0 (nonleaking); NaN for an empty group, and for LAS if there is one.
    """
    groups: dict[bool, list[int]] = {True: [], False: []}
    for both, alone, leak in zip(with_both, with_input, with_reason, strict=True):
        groups[bool(leak)].append(int(both) - int(alone))
    leaking, nonleaking = (100 * sum(own) / len(own) if own else NAN for own in (groups[True], groups[False]))
    return (leaking + nonleaking) / 2, leaking, nonleaking


def simulatability(
    inputs: Sequence[str], explanations: Sequence[str], labels: Sequence[str], *, seed: int = 0
) -> Simulatability:
    """Train a small simulator of a model's labels, and return its leakage-adjusted simulatability.

    The simulator is a logistic regression on the words of the input and those of the explanation, as separate columns.
    It is trained on three copies of each answer, with both texts and with either alone, and predicts each answer from a
    model that has not seen it.

    Source: Hase et al. 2020, whose simulator is a fine-tuned T5 or RoBERTa with the same dropout of texts, trained on a
    training set; here it is linear and cross-validated, so that its scores cannot be compared with published ones.

    Args:
        inputs: Text of each input.
        explanations: Explanations of each answer as one text.
        labels: Label that the model predicted, from one set of labels for all inputs.
        seed: Seed of the folds.

    Returns:
        Scores; all NaN for fewer than `LEAST` answers or a single predicted label.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]
        from sklearn.feature_extraction.text import CountVectorizer  # pyright: ignore[reportMissingTypeStubs]
        from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingTypeStubs]
        from sklearn.model_selection import KFold  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("scikit-learn", "wt5") from None
    if len(labels) < LEAST or len(set(labels)) < 2:
        return Simulatability(*[NAN] * len(Simulatability._fields))
    library: Any = (sparse, CountVectorizer, LogisticRegression)
    right: dict[str, list[bool]] = {name: [False] * len(labels) for name in ("both", "input", "reason")}
    folds: Any = KFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(labels):
        predict = _simulator(library, *(_at(values, train) for values in (inputs, explanations, labels)))
        empty = [""] * len(test)
        own, reasons = _at(inputs, test), _at(explanations, test)
        given = {"both": (own, reasons), "input": (own, empty), "reason": (empty, reasons)}
        for name, texts in given.items():
            for place, found in zip(test, predict(*texts), strict=True):
                right[name][place] = found == labels[place]
    las = leakage_adjusted(right["both"], right["input"], right["reason"])
    rates = (100 * sum(right[name]) / len(labels) for name in ("reason", "both", "input"))
    return Simulatability(*las, *rates)


def _at(values: Sequence[str], places: Sequence[int]) -> list[str]:
    return [values[place] for place in places]


def _simulator(library: Any, inputs: Sequence[str], explanations: Sequence[str], labels: Sequence[str]) -> Simulator:
    """Function from inputs and explanations to labels, trained on answers with both texts and with either alone."""
    sparse, vectorizer, regression = library
    if len(set(labels)) == 1:
        return lambda texts, _: [labels[0]] * len(texts)
    # words of one letter count, and a text without a word is a row of zeros
    words = [vectorizer(token_pattern=r"\w+", binary=True).fit([*texts, "x"]) for texts in (inputs, explanations)]

    def columns(texts: Sequence[str], reasons: Sequence[str]) -> Any:
        return sparse.hstack([own.transform(part) for own, part in zip(words, (texts, reasons), strict=True)]).tocsr()

    empty = [""] * len(labels)
    rows = [columns(inputs, explanations), columns(inputs, empty), columns(empty, explanations)]
    model = regression(max_iter=1000).fit(sparse.vstack(rows), [*labels] * 3)

    def predict(texts: Sequence[str], reasons: Sequence[str]) -> list[str]:
        return [str(label) for label in model.predict(columns(texts, reasons))]

    return predict
