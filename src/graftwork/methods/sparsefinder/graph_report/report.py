"""Result of comparing graph predictors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.methods.sparsefinder.graph_report.costs import ExecutorCost
from graftwork.methods.sparsefinder.graph_report.scores import Score


@dataclass(frozen=True)
class GraphReport:
    """Results of a comparison of graph predictors."""

    table: tuple[Mapping[str, Any], ...]
    """Recall at sparsity: one row per method and sparsity, chosen on tune, measured on test."""
    areas: Mapping[str, float]
    """Area under each method's curve between sparsity 0.6 and 0.95."""
    gold_sparsity: float
    """Share of pairs with an entmax probability of zero."""
    folder: Path
    """Folder of points, tables and plots."""
    scores: tuple[Score, ...] = ()
    """Perplexity and accuracy along the graphs; empty for other models and tasks than language models on text."""
    costs: tuple[ExecutorCost, ...] = ()
    """Times of the executors; empty if no lengths were given."""
