"""Settings of predictors and baselines that a comparison of graphs measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

WINDOWS: tuple[int | None, ...] = (None, 3, 5, 9, 15, 25)
"""Band widths to combine with every predictor."""
BLOCK_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Budgets of groupings that choose key blocks."""
TARGETS = (0.6, 0.7, 0.8, 0.805, 0.85, 0.9, 0.905, 0.95, 0.955)
"""Target sparsities of calibrated thresholds."""


@dataclass(frozen=True)
class Setting:
    """Predictor with its parameters, to be combined with windows."""

    method: str
    """Name of the curve."""
    changes: Mapping[str, Any]
    """Changed fields of the configuration."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Changed fields apart from grouping and window."""
        return {key: value for key, value in self.changes.items() if key not in ("grouping", "window_size")}


def grid(causal: bool) -> dict[str, list[Setting]]:
    """Settings of every method; baselines use a subset of the authors' sweeps.

    Source: appendix A of the specification.
    """

    def over(method: str, key: str, values: Sequence[Any], **fixed: Any) -> list[Setting]:
        return [Setting(method, {"grouping": method, key: value, **fixed}) for value in values]

    bins = ("num_clusters", (4, 8, 16)) if causal else ("bucket_size", (4, 8, 16))
    return {
        "window": [
            Setting("window", {"grouping": "window", "window_size": w})
            for w in (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 31, 41, 61, 91)
        ],
        "distance": over("distance", "target_sparsity", TARGETS, distance="l2", threshold=None),
        "cos": [
            replace(s, method="cos", changes={**s.changes, "distance": "cos"})
            for s in over("distance", "target_sparsity", TARGETS, threshold=None)
        ],
        "kmeans": [
            s for top in (1, 2, 3) for s in over("kmeans", "num_clusters", (4, 8, 12, 16, 20, 32), top_clusters=top)
        ],
        "fixed_bins": [replace(s, method="fixed_bins") for s in over("quantize", *bins, same_size=True)],
        "dynamic_bins": [replace(s, method="dynamic_bins") for s in over("quantize", *bins, same_size=False)],
        "random": over("random", "threshold", (0.05, 0.1, 0.2, 0.3)),
        "bigbird": over("bigbird", "baseline_size", (1, 2, 3, 4, 5, 8)),
        "longformer": over("longformer", "baseline_size", (4, 8, 12, 16, 20)),
        "openai_sparse": over("openai_sparse", "baseline_size", (4, 8, 12, 16, 20, 32, 48)),
        "reformer": over("reformer", "baseline_size", (4, 8, 16, 30)),
        "routing": over("routing", "num_clusters", (2, 4, 8, 12, 16, 20)),
    }


def block_grid(grouping: str, block_size: int) -> dict[str, list[Setting]]:
    """Settings of a run that chooses key blocks: its own grouping and the others without projections, by budget.

    Args:
        grouping: Grouping of the run.
        block_size: Tokens per block.
    """
    every = grid(causal=False)
    found = {name: every[name] for name in ("window", "random", "openai_sparse")}
    for name in dict.fromkeys((grouping, "mean_pooled", "pages")):
        settings = [{"grouping": name, "block_budget": budget, "block_size": block_size} for budget in BLOCK_BUDGETS]
        found[name] = [Setting(name, changes) for changes in settings]
    return found
