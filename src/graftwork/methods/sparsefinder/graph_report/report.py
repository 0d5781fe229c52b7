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
    """What a comparison of predictors found."""

    table: tuple[Mapping[str, Any], ...]
    """Recall at sparsity: one row for each method and sparsity, chosen on tune, measured on test."""
    areas: Mapping[str, float]
    """Area under each method's curve between sparsity 0.6 and 0.95."""
    gold_sparsity: float
    """Share of pairs that entmax gives zero."""
    folder: Path
    """Where points, tables and pictures lie."""
    scores: tuple[Score, ...] = ()
    """Perplexity and accuracy along the graphs; empty for models and texts that have none."""
    costs: tuple[ExecutorCost, ...] = ()
    """Time of the executors; empty unless lengths were given."""
