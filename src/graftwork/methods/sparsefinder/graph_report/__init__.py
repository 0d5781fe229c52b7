"""Comparison of graph predictors on a trained run: recall and perplexity at sparsity, executor times, plots."""

from __future__ import annotations

from graftwork.methods.sparsefinder.graph_report.compare import compare_graphs
from graftwork.methods.sparsefinder.graph_report.costs import sorting_findings
from graftwork.methods.sparsefinder.graph_report.oracle_page import OracleReport, oracle_page
from graftwork.methods.sparsefinder.graph_report.report import GraphReport

__all__ = ["GraphReport", "OracleReport", "compare_graphs", "oracle_page", "sorting_findings"]
