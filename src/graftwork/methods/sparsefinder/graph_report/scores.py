"""Perplexity and accuracy of a language model along the graphs of several settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, GraftworkError
from graftwork.evaluation.language_modelling import MASK_SEED, score_chunks
from graftwork.grafting.converted import Converted
from graftwork.methods.sparsefinder.graph_report.comparison import Comparison, Point, chosen_points, setting_of
from graftwork.methods.sparsefinder.graph_report.grid import Setting
from graftwork.methods.sparsefinder.modules import override_rules
from graftwork.training.running_text import TextBatch, TextChunks, objective_of

SPARSITIES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Sparsities at which the best setting of every method on tune is scored."""
BATCH = 8
"""Number of chunks per forward pass."""
TOLERANCE = 1e-5
"""Relative tolerance between the perplexity on the gold graph and on all scores."""

ALL_SCORES, GOLD, EMPTY = "all scores", "gold graph", "empty graph"


@dataclass(frozen=True)
class Score:
    """Perplexity and accuracy of the model along the graphs of one setting; simulated, all scores are computed."""

    method: str
    """Predictor or baseline, or one of: all scores, gold graph, empty graph."""
    at: float | None
    """Sparsity for which the setting has the best recall on tune; null for the three fixed graphs."""
    window: int | None
    """Width of the additional band; null for none."""
    parameters: Mapping[str, Any]
    sparsity: float
    """Sparsity on the same chunks of the test half."""
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
    """Score a language model on all scores, the gold graph, the empty graph, and the best graphs of every method.

    Args:
        converted: Model with a language-model head.
        comparison: Comparison that fits the settings.
        points: Measured settings; the best ones on tune are scored on test.
        chunks: Text whose queries and keys were extracted.
        collate: Collator with labels; the token masks of a chunk are the same for every setting.
        numbers: Indices of the chunks of the test half.

    Raises:
        GraftworkError: If the gold graph changes the perplexity, which is impossible by definition.
    """
    collate = replace(collate, seed=MASK_SEED)
    gold_sparsity = points[0].gold_sparsity
    fixed = {
        ALL_SCORES: (Setting(ALL_SCORES, {"grouping": None}), 0.0, 1.0),
        GOLD: (Setting(GOLD, {"grouping": "gold"}), gold_sparsity, 1.0),
        EMPTY: (Setting(EMPTY, {"grouping": "random", "threshold": 0.0, "add_cls_mask": False}), 1.0, 0.0),
    }
    chosen = chosen_points(points, SPARSITIES)
    known: dict[int, dict[str, float]] = {}

    def score(setting: Setting, window: int | None) -> dict[str, float]:
        with override_rules(converted.model, comparison.rules(setting, window)):
            return score_chunks(converted, chunks, collate, numbers, batch_size=BATCH)

    scores: list[Score] = []
    with Progress("perplexity along graphs", total=len(fixed) + len(chosen)) as progress:
        for name, (setting, sparsity, recall) in fixed.items():
            found = score(setting, None)
            scores.append(Score(name, None, None, {}, sparsity, recall, found["perplexity"], found["token_accuracy"]))
            progress.advance(1)
        for at, point in chosen:
            found = known.get(id(point)) or score(setting_of(point), point.window)
            known[id(point)] = found
            scores.append(
                Score(
                    point.method,
                    at,
                    point.window,
                    point.parameters,
                    point.sparsity,
                    point.recall,
                    found["perplexity"],
                    found["token_accuracy"],
                )
            )
            progress.advance(1)
    whole, gold = scores[0].perplexity, scores[1].perplexity
    # not <=, so that NaN fails
    if not abs(gold - whole) <= TOLERANCE * whole:
        raise GraftworkError(
            f"The perplexity is {gold} on the gold graph and {whole} on all scores. Expected equal values. Please "
            "report this with the output of `graftwork doctor`."
        )
    return scores


def has_perplexity(converted: Converted) -> bool:
    """True if the model has a language-model objective."""
    try:
        objective_of(converted.model)
    except ConfigError:
        return False
    return True
