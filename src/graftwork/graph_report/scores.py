"""What a predicted graph does to a language model: perplexity and accuracy on the graphs of several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftwork.checkpoint import Converted
from graftwork.errors import ConfigError, GraftworkError
from graftwork.language_modelling import MASK_SEED, score_chunks
from graftwork.methods.sparsefinder.comparison import Comparison, Point, Setting, chosen_points, setting_of
from graftwork.methods.sparsefinder.modules import following
from graftwork.progress import Progress
from graftwork.training.running_text import TextBatch, TextChunks, objective_of

SPARSITIES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Sparsities at which every method's best setting on tune is scored."""
BATCH = 8
TOLERANCE = 1e-5
"""How far the perplexity on the gold graph may lie from that of all scores, relative to it."""

ALL_SCORES, GOLD, EMPTY = "all scores", "gold graph", "empty graph"


@dataclass(frozen=True)
class Score:
    """Perplexity and accuracy of the model along the graphs of one setting; simulated, all scores are computed."""

    method: str
    """Predictor or baseline; or all scores, the gold graph, the empty graph."""
    window: int | None
    parameters: Mapping[str, Any]
    sparsity: float
    """On the same chunks of the test half."""
    recall: float
    perplexity: float
    token_accuracy: float


def score_graphs(
    converted: Converted,
    comparison: Comparison,
    points: Sequence[Point],
    chunks: TextChunks,
    collate: TextBatch,
    numbers: Sequence[int],
) -> list[Score]:
    """Score a language model on all scores, on the gold graph, on the empty one, and on every method's best graphs.

    Args:
        converted: The model, with a language-model head.
        comparison: Fits the settings.
        points: What was measured of them; the best on tune are scored, on test.
        chunks: The text that queries and keys were taken from.
        collate: Makes batches with labels; the masks of a chunk are the same for every setting.
        numbers: Chunks of the test half.

    Raises:
        GraftworkError: If the gold graph changes the perplexity, which it cannot by definition.
    """
    collate = replace(collate, seed=MASK_SEED)
    gold_sparsity = points[0].gold_sparsity
    wanted: list[tuple[str, Setting, int | None, float, float]] = [
        (ALL_SCORES, Setting(ALL_SCORES, {"grouping": None}), None, 0.0, 1.0),
        (GOLD, Setting(GOLD, {"grouping": "gold"}), None, gold_sparsity, 1.0),
        (EMPTY, Setting(EMPTY, {"grouping": "random", "threshold": 0.0, "add_cls_mask": False}), None, 1.0, 0.0),
    ]
    seen = set()
    for _, point in chosen_points(points, SPARSITIES):
        if id(point) not in seen:
            seen.add(id(point))
            wanted.append((point.method, setting_of(point), point.window, point.sparsity, point.recall))
    scores = []
    with Progress("perplexity along graphs", total=len(wanted)) as progress:
        for name, setting, window, sparsity, recall in wanted:
            with following(converted.model, comparison.rules(setting, window)):
                found = score_chunks(converted, chunks, collate, numbers, batch_size=BATCH)
            parameters = {} if name in (ALL_SCORES, GOLD, EMPTY) else setting.parameters
            scores.append(
                Score(name, window, parameters, sparsity, recall, found["perplexity"], found["token_accuracy"])
            )
            progress.advance(1)
    whole, gold = scores[0].perplexity, scores[1].perplexity
    if abs(gold - whole) > TOLERANCE * whole:
        raise GraftworkError(
            f"The perplexity is {gold} on the gold graph and {whole} on all scores. These must be equal; please report "
            "this with the output of `graftwork doctor`."
        )
    return scores


def can_score(converted: Converted, chunks: Any) -> bool:
    """Whether the held-out text and the model have a perplexity."""
    if not isinstance(chunks, TextChunks):
        return False
    try:
        objective_of(converted.model)
    except ConfigError:
        return False
    return True
