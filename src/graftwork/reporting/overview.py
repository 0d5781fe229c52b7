"""Overview of several runs: tables of scores and costs, and one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.reporting.picture import Picture
from graftwork.reporting.plots import Bar, scores_of_runs

if TYPE_CHECKING:
    from graftwork.reporting.report import RunReport

SCORES = "Scores of all runs (measured), with published numbers"
COSTS = "Cost of all runs at the longest length of each (measured)"


@dataclass(frozen=True)
class Overview:
    """Tables and plots that combine several runs."""

    tables: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict[str, Sequence[Mapping[str, str]]])
    """Rows by table title; all rows of a table have the same keys."""
    pictures: Mapping[str, Picture] = field(default_factory=dict[str, Picture])
    """Plots by title."""


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a distinct name for each run: the shortest number of trailing folders that is unique."""
    whole = [path.resolve().parts for path in paths]
    deepest = max((len(parts) for parts in whole), default=1)
    for count in range(1, deepest + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in paths]


def overview_of(reports: Sequence[RunReport]) -> Overview:
    """Build the tables and the plot of several runs; empty for a single run, whose report has them already."""
    if len(reports) < 2:
        return Overview()
    tables = {SCORES: _scores(reports), COSTS: _costs(reports)}
    bars = _bars(reports)
    return Overview(
        {title: rows for title, rows in tables.items() if rows},
        {"First score of each task": scores_of_runs(bars)} if bars else {},
    )


def _scores(reports: Sequence[RunReport]) -> list[dict[str, str]]:
    columns = list(dict.fromkeys(column for report in reports for column in report.table.columns))
    rows: list[dict[str, str]] = []
    for report in reports:
        for setting, cells in report.table.rows:
            own = {
                column: f"{cell.text} ({cell.note})" if cell.note else cell.text
                for column, cell in zip(report.table.columns, cells, strict=True)
            }
            about = {"run": report.name, "method": report.results.method or "none", "setting": setting}
            rows.append({**about, **{column: own.get(column, "–") for column in columns}})
    return rows


def _costs(reports: Sequence[RunReport]) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for report in reports:
        for label in dict.fromkeys(row.label for row in report.results.cost):
            row = max((row for row in report.results.cost if row.label == label), key=lambda one: one.length)
            rows.append(
                {
                    "run": report.name,
                    "setting": label,
                    "tokens": str(row.length),
                    "forward ms": "–" if row.forward_seconds is None else f"{1000 * row.forward_seconds:.1f}",
                    "forward + backward ms": f"{1000 * row.seconds:.1f}",
                    "saved MiB": f"{row.saved_bytes / 2**20:.2f}",
                    "device": row.device,
                }
            )
    return rows


def _bars(reports: Sequence[RunReport]) -> dict[str, list[Bar]]:
    """Return the bars of all runs and settings, by task and its first metric."""
    found: dict[str, list[Bar]] = {}
    for report in reports:
        first: dict[str, str] = {}
        for row in report.results.rows:
            if row.scores:
                first.setdefault(row.task, f"{row.task} {next(iter(row.scores))}")
        for setting, cells in report.table.rows:
            for column, cell in zip(report.table.columns, cells, strict=True):
                if column in first.values() and cell.value is not None:
                    bar = Bar(f"{report.name}: {setting}", cell.value, cell.published, setting.startswith("dense"))
                    found.setdefault(column, []).append(bar)
    return found
