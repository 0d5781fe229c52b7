"""Faithfulness of spans: change of the label probability without the spans, and with the spans alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from graftwork.core.example import Example
from graftwork.metrics.spans import Span
from graftwork.tasks.eraser import document_tokens

Probabilities = Callable[[Sequence[Example]], Sequence[Mapping[str, float]]]
"""Function from examples to the probability of every label of each example."""

SHARES = (0.01, 0.05, 0.10, 0.20, 0.50)
"""Shares of the highest-scoring tokens in the AOPC."""


class Faithfulness(NamedTuple):
    """Dependence of a label on its rationale; high comprehensiveness and low sufficiency are better."""

    comprehensiveness: float
    sufficiency: float


def comprehensiveness(full: float, without: float) -> float:
    """Drop of the label probability if the rationale is removed: p(y | x) − p(y | x without r).

    Source: DeYoung et al. 2020, ERASER.
    """
    return full - without


def sufficiency(full: float, alone: float) -> float:
    """Drop of the label probability if only the rationale is kept: p(y | x) − p(y | r).

    Source: DeYoung et al. 2020, ERASER.
    """
    return full - alone


def aopc(differences: Sequence[float]) -> float:
    """Area over the perturbation curve: mean of the drops over increasing shares of the highest-scoring tokens.

    Source: DeYoung et al. 2020, ERASER, with the shares of `SHARES`.
    """
    return sum(differences) / len(differences)


def without_tokens(row: Example, removed: set[int], *, mask: str | None = None) -> Example:
    """Remove tokens from the source of an example; prompt, question and answer are kept.

    Args:
        row: Example.
        removed: Positions of the white-space tokens to remove.
        mask: Replacement of each removed token; None deletes it.
    """
    tokens = document_tokens(row.metadata["source"])
    kept = [token if place not in removed else mask for place, token in enumerate(tokens)]
    text = " ".join(token for token in kept if token is not None)
    start = row.metadata["source_start"]
    end = start + len(row.metadata["source"])
    metadata = {**row.metadata, "source": text}
    return replace(row, input=row.input[:start] + text + row.input[end:], metadata=metadata)


def positions(spans: Sequence[Span]) -> set[int]:
    """Token positions inside the spans."""
    return {place for start, end in spans for place in range(start, end)}


def measure_faithfulness(
    rows: Sequence[Example],
    labels: Sequence[str],
    spans: Sequence[Sequence[Span]],
    probabilities: Probabilities,
    *,
    full: Sequence[Mapping[str, float]],
    mask: str | None = None,
) -> list[Faithfulness | None]:
    """Comprehensiveness and sufficiency of the spans of each answer.

    Args:
        rows: Examples with a source.
        labels: Predicted label of each example on its full input.
        spans: Predicted spans of each example over white-space tokens.
        probabilities: Function for label probabilities.
        full: Label probabilities on the full inputs.
        mask: Replacement of each removed token; None deletes it.

    Returns:
        None for examples without a span or with an invalid label.
    """
    return differences(perturbed_probabilities(rows, labels, spans, probabilities, mask=mask), labels, full)


class PerturbedProbabilities(NamedTuple):
    """Label probabilities of one example on perturbed inputs."""

    without: Mapping[str, float]
    """Probabilities without the spans."""
    alone: Mapping[str, float]
    """Probabilities with the spans alone."""


def perturbed_probabilities(
    rows: Sequence[Example],
    labels: Sequence[str],
    spans: Sequence[Sequence[Span]],
    probabilities: Probabilities,
    *,
    mask: str | None = None,
) -> dict[int, PerturbedProbabilities]:
    """Label probabilities without the spans and with the spans alone, by index of the example.

    Examples without a span or with an invalid label are omitted.

    Args:
        rows: Examples with a source.
        labels: Predicted label of each example on its full input.
        spans: Predicted spans of each example over white-space tokens.
        probabilities: Function for label probabilities.
        mask: Replacement of each removed token; None deletes it.
    """
    chosen = [
        index
        for index, (row, label, own) in enumerate(zip(rows, labels, spans, strict=True))
        if own and label in row.metadata["choices"]
    ]
    marked = {index: positions(spans[index]) for index in chosen}
    everything = {index: set(range(len(document_tokens(rows[index].metadata["source"])))) for index in chosen}
    without = probabilities([without_tokens(rows[index], marked[index], mask=mask) for index in chosen])
    # with the rationale alone, other tokens are deleted even if a mask is given
    alone = probabilities([without_tokens(rows[index], everything[index] - marked[index]) for index in chosen])
    return {
        index: PerturbedProbabilities(removed, kept)
        for index, removed, kept in zip(chosen, without, alone, strict=True)
    }


def differences(
    perturbed: Mapping[int, PerturbedProbabilities], labels: Sequence[str], full: Sequence[Mapping[str, float]]
) -> list[Faithfulness | None]:
    """Drops of the label probabilities; None for examples without perturbed probabilities."""
    found: list[Faithfulness | None] = [None] * len(labels)
    for index, (without, alone) in perturbed.items():
        label, before = labels[index], full[index][labels[index]]
        found[index] = Faithfulness(comprehensiveness(before, without[label]), sufficiency(before, alone[label]))
    return found


def measure_aopc(
    rows: Sequence[Example],
    labels: Sequence[str],
    scores: Sequence[Sequence[float]],
    probabilities: Probabilities,
    *,
    full: Sequence[Mapping[str, float]],
) -> list[Faithfulness | None]:
    """Comprehensiveness and sufficiency averaged over increasing shares of the highest-scoring tokens.

    Args:
        rows: Examples with a source.
        labels: Predicted label of each example on its full input.
        scores: Score of each token of each source.
        probabilities: Function for label probabilities.
        full: Label probabilities on the full inputs.
    """
    steps: list[list[Faithfulness | None]] = []
    for share in SHARES:
        spans: list[list[Span]] = []
        for own in scores:
            best = sorted(range(len(own)), key=lambda place, own=own: (-own[place], place))
            kept = max(1, round(share * len(own))) if any(own) else 0
            spans.append([(place, place + 1) for place in best[:kept]])
        steps.append(measure_faithfulness(rows, labels, spans, probabilities, full=full))
    found: list[Faithfulness | None] = []
    for each in zip(*steps, strict=True):
        measured = [one for one in each if one is not None]
        found.append(
            Faithfulness(aopc([one[0] for one in measured]), aopc([one[1] for one in measured])) if measured else None
        )
    return found


def means(values: Sequence[Faithfulness | None], prefix: str = "") -> dict[str, float]:
    """Means over the examples with a value; empty if there are none."""
    there = [value for value in values if value is not None]
    return {
        prefix + name: sum(getattr(value, name) for value in there) / len(there)
        for name in Faithfulness._fields
        if there
    }
