"""Compare graph predictors on a trained run: recall and perplexity at sparsity, time of executors, pictures."""

from __future__ import annotations

from graftwork.graph_report.compare import GraphReport, compare_graphs

__all__ = ["GraphReport", "compare_graphs"]
