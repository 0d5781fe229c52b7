"""Scores of explanations over all answers: consistency of the label, simulatability, BERTScore."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graftwork.core.example import Example
from graftwork.core.messages import say
from graftwork.errors import ConfigError
from graftwork.methods.wt5.orders import ANSWER_ORDER
from graftwork.metrics.bertscore import bert_score
from graftwork.metrics.simulatability import LEAST, simulatability
from graftwork.tasks.inputs import request_explanation

Predict = Callable[[Sequence[Example]], Sequence[Mapping[str, Any]]]
"""Function from examples to answers with `answer`."""


def label_consistency(rows: Sequence[Example], found: Sequence[dict[str, Any]], predict: Predict) -> dict[str, float]:
    """Share of answers whose label is the same without the request for an explanation, and their number.

    Args:
        rows: Examples as they are formatted for the model.
        found: Details of each answer, which receive the label without an explanation.
        predict: Answers to examples.
    """
    asked = [place for place, row in enumerate(rows) if row.metadata.get("explain")]
    if not asked:
        return {"consistency": float("nan"), "consistency_n": 0.0}
    plain = predict([_label_only(rows[place]) for place in asked])
    same = 0
    for place, answer in zip(asked, plain, strict=True):
        label = answer["answer"]["label"]
        found[place]["label_without_explanation"] = label
        same += label == found[place]["label"]
    return {"consistency": 100 * same / len(asked), "consistency_n": float(len(asked))}


def _label_only(row: Example) -> Example:
    """Example that asks for the label alone."""
    asked = request_explanation(row, explain=False)
    kept = {name: value for name, value in asked.metadata.items() if name != ANSWER_ORDER}
    return Example(asked.key, asked.input, asked.target, asked.answers, {**kept, "explain": False}, asked.pair)


def simulated(rows: Sequence[Example], found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Leakage-adjusted simulatability of the answers with an explanation, and their number.

    Args:
        rows: Examples.
        found: Details of each answer.

    Raises:
        ConfigError: If the labels of the rows differ.
    """
    if len({tuple(row.metadata["choices"]) for row in rows}) > 1:
        raise ConfigError(
            "simulatability is on, and the rows have labels of their own (multiple choice). Expected one set of labels "
            "for all rows, which the simulator predicts. Leave it out for this task."
        )
    chosen = [place for place, entry in enumerate(found) if entry["explanations"]]
    scores = simulatability(
        [str(rows[place].metadata.get("source", rows[place].input)) for place in chosen],
        [" ".join(found[place]["explanations"]) for place in chosen],
        [str(found[place]["label"]) for place in chosen],
    )
    if math.isnan(scores.las):
        say(
            f"Leakage-adjusted simulatability is undefined for {len(chosen)} answers with an explanation: it needs "
            f"{LEAST}, two labels, and explanations of which some give the label away and some do not."
        )
    named = {name if name == "las" else f"las_{name}": value for name, value in scores._asdict().items()}
    return {**named, "las_n": float(len(chosen))}


def similarity(found: Sequence[Mapping[str, Any]], model: str, device: str) -> dict[str, float]:
    """BERTScore of the answers that have an explanation and a gold one, and their number.

    Args:
        found: Details of each answer.
        model: Folder of an encoder.
        device: Device of the encoder.

    Raises:
        ConfigError: If explanations are spans, or the folder contains no encoder.
    """
    if any("source" in entry for entry in found):
        raise ConfigError(
            f"bertscore is {model}, which has an effect on free-text explanations only; these are spans, which token "
            "F1 scores. Leave it out for this task."
        )
    pairs = [(" ".join(entry["explanations"]), entry["gold_explanations"]) for entry in found
             if entry["explanations"] and entry.get("gold_explanations")]  # fmt: skip
    if not pairs:
        return {"bertscore": float("nan"), "bertscore_n": 0.0}
    value = bert_score([text for text, _ in pairs], [own for _, own in pairs], model, device=device)
    return {"bertscore": value, "bertscore_n": float(len(pairs))}
