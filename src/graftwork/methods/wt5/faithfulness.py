"""Faithfulness of spans: change of the label probability without the spans, and with the spans alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from graftwork.core.example import Example
from graftwork.metrics.spans import Span, merge_spans
from graftwork.tasks.eraser import token_places
from graftwork.tasks.spans import collapsed, token_spans, word_places

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


def without_spans(row: Example, removed: Sequence[Span], *, mask: str | None = None) -> Example:
    """Remove spans from the source of an example; prompt, question and answer are kept.

    The remaining words are joined by single spaces, as ERASER joins its tokens.

    Args:
        row: Example.
        removed: Character offsets of the spans to remove.
        mask: Replacement of each removed word; None deletes it.
    """
    source = row.metadata["source"]
    kept: list[str] = []
    end = 0
    for first, last in merge_spans(removed):
        words = [] if mask is None else [mask] * len(source[first:last].split())
        kept += [source[end:first], *words, ""]
        end = last
    return _with_source(row, " ".join([*kept, source[end:]]))


def only_spans(row: Example, spans: Sequence[Span]) -> Example:
    """Keep nothing but spans of the source of an example, in its order, joined by spaces.

    Args:
        row: Example.
        spans: Character offsets of the spans to keep.
    """
    source = row.metadata["source"]
    return _with_source(row, " ".join(source[first:last] for first, last in merge_spans(spans)))


def _with_source(row: Example, text: str) -> Example:
    text = collapsed(text)
    start = row.metadata["source_start"]
    end = start + len(row.metadata["source"])
    changed = replace(row, input=row.input[:start] + text + row.input[end:], metadata={**row.metadata, "source": text})
    # a conversation repeats the input as its question
    if "turns" in row.metadata:
        turns = tuple((role, changed.input if told == row.input else told) for role, told in row.metadata["turns"])
        changed = replace(changed, metadata={**changed.metadata, "turns": turns})
    return changed


def random_spans(row: Example, spans: Sequence[Span], generator: Random) -> list[Span]:
    """Spans of as many words each at random positions of the source: the baseline of faithfulness.

    Args:
        row: Example.
        spans: Character offsets of the spans whose lengths are matched.
        generator: Random numbers.
    """
    places = word_places(row.metadata["source"])
    found: list[Span] = []
    for first, last in token_spans(spans, places):
        start = generator.randrange(len(places) - (last - first) + 1)
        found.append((places[start][0], places[start + last - first - 1][1]))
    return found


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
        spans: Predicted spans of each example, as character offsets of its source.
        probabilities: Function for label probabilities.
        full: Label probabilities on the full inputs.
        mask: Replacement of each removed word; None deletes it.

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
        spans: Predicted spans of each example, as character offsets of its source.
        probabilities: Function for label probabilities.
        mask: Replacement of each removed word; None deletes it.
    """
    chosen = [
        index
        for index, (row, label, own) in enumerate(zip(rows, labels, spans, strict=True))
        if own and label in row.metadata["choices"]
    ]
    without = probabilities([without_spans(rows[index], spans[index], mask=mask) for index in chosen])
    # with the rationale alone, other words are deleted even if a mask is given
    alone = probabilities([only_spans(rows[index], spans[index]) for index in chosen])
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


def span_faithfulness(
    rows: Sequence[Example],
    labels: Sequence[str],
    spans: Sequence[Sequence[Span]],
    probabilities: Probabilities,
    *,
    full: Sequence[Mapping[str, float]],
    mask: str | None = None,
) -> dict[int, list[Faithfulness]]:
    """Comprehensiveness and sufficiency of every span by itself, by index of the example.

    Examples without a span or with an invalid label are omitted.

    Args:
        rows: Examples with a source.
        labels: Predicted label of each example on its full input.
        spans: Predicted spans of each example, as character offsets of its source.
        probabilities: Function for label probabilities.
        full: Label probabilities on the full inputs.
        mask: Replacement of each removed word; None deletes it.
    """
    places = [index for index, own in enumerate(spans) for _ in own]
    each = measure_faithfulness(
        [rows[index] for index in places],
        [labels[index] for index in places],
        [[span] for own in spans for span in own],
        probabilities,
        full=[full[index] for index in places],
        mask=mask,
    )
    found: dict[int, list[Faithfulness]] = {}
    for index, value in zip(places, each, strict=True):
        if value is not None:
            found.setdefault(index, []).append(value)
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
        scores: Score of each of ERASER's tokens of each source.
        probabilities: Function for label probabilities.
        full: Label probabilities on the full inputs.
    """
    steps: list[list[Faithfulness | None]] = []
    for share in SHARES:
        spans: list[list[Span]] = []
        for row, own in zip(rows, scores, strict=True):
            places = token_places(row.metadata["source"])
            best = sorted(range(len(own)), key=lambda place, own=own: (-own[place], place))
            kept = max(1, round(share * len(own))) if any(own) else 0
            spans.append([places[place] for place in best[:kept]])
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
