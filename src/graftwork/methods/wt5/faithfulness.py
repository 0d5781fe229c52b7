"""Whether a model decides by the spans that it names: what becomes of its label without them, and by them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from graftwork.core.example import Example
from graftwork.metrics.spans import Span
from graftwork.tasks.eraser import document_tokens

Probabilities = Callable[[Sequence[Example]], Sequence[Mapping[str, float]]]
"""Gives the probability of every label of each example."""

SHARES = (0.01, 0.05, 0.10, 0.20, 0.50)
"""Shares of the best-scored tokens over which the AOPC averages."""


class Faithfulness(NamedTuple):
    """How much a label rests on a rationale; high comprehensiveness and low sufficiency are good."""

    comprehensiveness: float
    sufficiency: float


def comprehensiveness(full: float, without: float) -> float:
    """How much the probability of the label falls when the rationale is removed.

    Source: DeYoung et al. 2020, ERASER.
    """
    return full - without


def sufficiency(full: float, alone: float) -> float:
    """How much the probability of the label falls when nothing but the rationale is left.

    Source: DeYoung et al. 2020, ERASER.
    """
    return full - alone


def aopc(differences: Sequence[float]) -> float:
    """The mean of such differences over growing shares of the best-scored tokens.

    Source: DeYoung et al. 2020, ERASER, with the shares of `SHARES`.
    """
    return sum(differences) / len(differences)


def without_tokens(row: Example, removed: set[int], *, mask: str | None = None) -> Example:
    """The example without some tokens of its source; prompt, question and answer stay.

    Args:
        row: The example.
        removed: Positions among the tokens between white space.
        mask: What stands in the place of a token; None joins the others by one space.
    """
    tokens = document_tokens(row.metadata["source"])
    kept = [token if place not in removed else mask for place, token in enumerate(tokens)]
    text = " ".join(token for token in kept if token is not None)
    start = row.metadata["source_start"]
    end = start + len(row.metadata["source"])
    metadata = {**row.metadata, "source": text}
    return replace(row, input=row.input[:start] + text + row.input[end:], metadata=metadata)


def positions(spans: Sequence[Span]) -> set[int]:
    """Every token position that the spans cover."""
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
    """Comprehensiveness and sufficiency of each answer's spans.

    Args:
        rows: Examples with a source.
        labels: The label predicted for each on its full input.
        spans: The spans predicted for each, over tokens between white space.
        probabilities: Scores the labels of examples.
        full: The probabilities on the full inputs.
        mask: What stands in the place of a removed token; None deletes it.

    Returns:
        None where there is no span, or the label is none of the example's.
    """
    return differences(relabelled(rows, labels, spans, probabilities, mask=mask), labels, full)


class Relabelled(NamedTuple):
    """The probability of every label of one example, asked again."""

    without: Mapping[str, float]
    """Without the spans."""
    alone: Mapping[str, float]
    """With nothing but the spans."""


def relabelled(
    rows: Sequence[Example],
    labels: Sequence[str],
    spans: Sequence[Sequence[Span]],
    probabilities: Probabilities,
    *,
    mask: str | None = None,
) -> dict[int, Relabelled]:
    """Label probabilities without spans and by them alone, by the index of each example that has any."""
    chosen = [
        index
        for index, (row, label, own) in enumerate(zip(rows, labels, spans, strict=True))
        if own and label in row.metadata["choices"]
    ]
    marked = {index: positions(spans[index]) for index in chosen}
    everything = {index: set(range(len(document_tokens(rows[index].metadata["source"])))) for index in chosen}
    without = probabilities([without_tokens(rows[index], marked[index], mask=mask) for index in chosen])
    # the rationale alone is joined as it is, under masking too: nothing stands for what is not there
    alone = probabilities([without_tokens(rows[index], everything[index] - marked[index]) for index in chosen])
    return {index: Relabelled(*both) for index, *both in zip(chosen, without, alone, strict=True)}


def differences(
    asked: Mapping[int, Relabelled], labels: Sequence[str], full: Sequence[Mapping[str, float]]
) -> list[Faithfulness | None]:
    """What the probability of each label loses; None for examples that were not asked again."""
    found: list[Faithfulness | None] = [None] * len(labels)
    for index, (without, alone) in asked.items():
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
    """Comprehensiveness and sufficiency averaged over growing shares of the tokens with the best scores.

    Args:
        rows: Examples with a source.
        labels: The label predicted for each on its full input.
        scores: A score for each token of each source.
        probabilities: Scores the labels of examples.
        full: The probabilities on the full inputs.
    """
    steps = []
    for share in SHARES:
        spans = []
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


def means(values: Sequence[Faithfulness | None], prefix: str = "") -> dict[str, Any]:
    """The averages over examples that have one; empty if none has."""
    there = [value for value in values if value is not None]
    return {
        prefix + name: sum(getattr(value, name) for value in there) / len(there)
        for name in Faithfulness._fields
        if there
    }
