"""Output files of a comparison of graphs: points, tables, plots, and extras of the report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwork.core.config import to_plain
from graftwork.core.files import replace_bytes, write_json, write_record, write_text
from graftwork.core.run_folder import EXTRAS_FILE
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.graph_report.comparison import Comparison, Point, curves, setting_of
from graftwork.methods.sparsefinder.graph_report.costs import OWN, ExecutorCost
from graftwork.methods.sparsefinder.graph_report.plots import heat_maps, one_head, pareto, time_of_executors
from graftwork.methods.sparsefinder.graph_report.scores import ALL_SCORES, EMPTY, GOLD, Score
from graftwork.methods.sparsefinder.graphs import Graph, Pattern
from graftwork.metrics.sparsity import pareto_frontier
from graftwork.reporting.picture import Picture

if TYPE_CHECKING:
    from graftwork.methods.sparsefinder.graph_report.report import GraphReport

TOKENS_SHOWN = 64
"""Maximal number of tokens in the plot of a single graph."""


def write_graphs(report: GraphReport, points: Sequence[Point], comparison: Comparison) -> None:
    """Write a comparison to its folder.

    Args:
        report: Results of the comparison.
        points: All settings, on tune and on test.
        comparison: Comparison with the graphs of single heads.
    """
    folder = report.folder
    write_json(folder / "points.json", [to_plain(point) for point in points])
    write_text(folder / "points.csv", _csv([_flat(point) for point in points]))
    write_json(
        folder / "table.json",
        {"table": report.table, "areas": dict(report.areas), "gold_sparsity": report.gold_sparsity},
    )
    write_text(folder / "table.md", _markdown(report.table))
    pictures: dict[str, tuple[str, Picture, bool]] = {}
    tests = [point for point in points if point.split == "test"]
    every = {name: [(p.sparsity, p.recall) for p in tests if p.method == name] for name in _methods(tests)}
    pictures["pareto.png"] = (
        "Recall of the entmax graph against sparsity",
        pareto(curves(points), every, report.gold_sparsity),
        False,
    )
    if report.scores:
        write_json(folder / "scores.json", [to_plain(score) for score in report.scores])
        pictures["perplexity.png"] = (
            "Perplexity along the graphs against sparsity",
            _perplexities(report.scores, report.gold_sparsity),
            False,
        )
    best = _best(points, report.table)
    if best is not None:
        graphs = Picture(_one_head(best, comparison))
        pictures["one_head.png"] = ("Graphs of one head: gold, predicted, resulting", graphs, True)
        shown = {name: best.heads[name] for name in ("gold_sparsity", "sparsity", "recall", "exact")}
        pictures["heads.png"] = (f"Every head: {_named(best)}", Picture(heat_maps(shown, comparison.paths)), True)
    if report.costs:
        rows = [to_plain(cost) for cost in report.costs]
        write_json(folder / "executors.json", rows)
        pictures["executors.png"] = (
            "One attention layer: time against length (measured)",
            time_of_executors(rows),
            True,
        )
    for name, (_, picture, _) in pictures.items():
        replace_bytes(folder / name, picture.png)
    extras = {
        "pictures": [
            {
                "file": name,
                "title": title,
                "wide": wide,
                "sha256": sha256(picture.png).hexdigest(),
                "svg": picture.svg,
                "lines": to_plain(picture.lines),
            }
            for name, (title, picture, wide) in pictures.items()
        ],
        "tables": _tables(report),
    }
    write_record(folder / EXTRAS_FILE, extras)


def _methods(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.method for point in points))


def _named(point: Point) -> str:
    return f"{point.method}, window {point.window or 'none'}"


def _perplexities(scores: Sequence[Score], gold_sparsity: float) -> Picture:
    """Draw perplexity against sparsity; lower is better."""
    named = (ALL_SCORES, GOLD, EMPTY)
    methods = dict.fromkeys(score.method for score in scores if score.method not in named)
    every = {name: [(s.sparsity, s.perplexity) for s in scores if s.method == name] for name in methods}
    frontiers = {name: [(x, -y) for x, y in pareto_frontier([(x, -y) for x, y in own])] for name, own in every.items()}
    whole = {score.method: score.perplexity for score in scores if score.method == ALL_SCORES}
    return pareto(frontiers, every, gold_sparsity, "perplexity", whole)


def _best(points: Sequence[Point], table: Sequence[Mapping[str, Any]]) -> Point | None:
    """Test point of the learned predictor with the best recall at the middle sparsity."""
    learned = ("distance", "kmeans", "cos", "gate", "mean_pooled", "pages")
    rows = [row for row in table if row["method"] in learned]
    middle = sorted({row["at"] for row in rows})
    if not middle:
        return None
    own = [row for row in rows if row["at"] == middle[len(middle) // 2]]
    row = max(own, key=lambda row: row["test_recall"])
    return next(
        p
        for p in points
        if p.split == "test" and p.method == row["method"] and round(p.recall, 4) == row["test_recall"]
    )


def _one_head(point: Point, comparison: Comparison) -> bytes:
    """Draw the head with the most correctly predicted pairs outside the fixed patterns, on the first test sentence."""
    setting = setting_of(point)
    found: list[Tensor] = []
    for site in range(len(comparison.paths)):
        gold = comparison.gold_of("test", site, 0)[0]
        graph = comparison.graph_of(setting, point.window, "test", site, 0)[0]
        fixed = _fixed(point, comparison, site)
        found.append((gold & graph & ~fixed).sum((-2, -1)))  # [heads]
    site, head = divmod(int(torch.stack(found).argmax()), len(found[0]))
    data = comparison.data["test"][site][0]
    graph = comparison.graph_of(setting, point.window, "test", site, 0)[0, head]
    key = data.key.repeat_interleave(data.query.shape[1] // data.key.shape[1], 1)
    scale = data.scale[head] if isinstance(data.scale, Tensor) else data.scale
    scores = (data.query[0, head] * scale) @ key[0, head].mT
    alpha = data.site.gold_alpha(head, comparison.alpha(site))
    gold = entmax(scores.masked_fill(~data.allowed[0, 0], -torch.inf), alpha)
    resulting = entmax(scores.masked_fill(~(graph & data.allowed[0, 0]), -torch.inf), alpha)
    fixed = _fixed(point, comparison, site)
    queries, keys = (min(int(real[0].sum()), TOKENS_SHOWN) for real in (data.query_real, data.key_real))
    title = f"{comparison.paths[site]}, head {head}: {_named(point)}; most correct predictions outside the band"
    return one_head(*(x[:queries, :keys].double().numpy() for x in (gold, graph, fixed, resulting)), title=title)


def _fixed(point: Point, comparison: Comparison, site: int) -> Tensor:
    """Band and global tokens of the first test sentence [queries keys]."""
    data, config = comparison.data["test"][site][0], comparison.grafts[site].config
    pattern = Pattern(point.window, config.add_cls_mask, config.add_last_mask)
    return Graph(1, data.mask, pattern=pattern, query_real=data.query_real).dense()[0, 0]


def _tables(report: GraphReport) -> list[dict[str, Any]]:
    """Tables of the report: recall at sparsity, perplexity along graphs, times of executors."""
    tables = [
        _pivot(
            f"Recall of the entmax graph, whose own sparsity is {report.gold_sparsity:.3f} (simulated)",
            "Settings and windows w are chosen on one half of the held-out text and reported on the other; the reached "
            "sparsity is in brackets. – marks methods that never reach the sparsity.",
            "method",
            "at sparsity",
            {(row["method"], row["at"]): _cell(report.table, row["method"], row["at"]) for row in report.table},
        )
    ]
    if report.scores:
        whole, gold, empty = report.scores[:3]
        cells = {
            (s.method, s.at): f"{s.perplexity:.3f} ({s.sparsity:.3f}, w {s.window or '–'})"
            for s in report.scores
            if s.at is not None
        }
        note = (
            f"Perplexity is {whole.perplexity:.3f} on all scores, {gold.perplexity:.3f} on the entmax graph itself "
            f"(sparsity {gold.sparsity:.3f}), {empty.perplexity:.3f} on an empty graph. Settings have the best recall "
            "on the tuning half."
        )
        title = "Perplexity of the model along the graphs (simulated: all scores are computed)"
        tables.append(_pivot(title, note, "method", "at sparsity", cells))
    measured = [cost for cost in report.costs if not cost.backward and cost.graph is not None]
    if measured:
        tables.append(_qualities(measured))
    for backward in (False, True):
        own = [cost for cost in report.costs if cost.backward == backward]
        if own:
            note = (
                "Queries and keys of the held-out text, concatenated to each length; the time divided by that of SDPA "
                "is in brackets. The table above has the quality of each graph on the same queries and keys."
            )
            cells = {(c.label, c.length): f"{1000 * c.seconds:.1f} ms ({c.time_ratio:.2f})" for c in own}
            title = f"One attention layer, {'forward and backward' if backward else 'forward'} (measured)"
            tables.append(_pivot(title, note, "attention", "tokens", cells))
    return tables


def _qualities(costs: Sequence[ExecutorCost]) -> dict[str, Any]:
    """Table of the quality of every timed graph, one row per graph and length, the run's own graph first."""
    rows: dict[tuple[str, int], list[str]] = {}
    for cost in costs:
        found = (cost.sparsity, cost.recall, cost.mass, cost.kept_64, cost.kept_16, cost.sorted_64, cost.sorted_16)
        label = f"{cost.graph}, executor {cost.executor}" if str(cost.graph).startswith(OWN) else str(cost.graph)
        cells = ["–" if value is None else f"{value:.3f}" for value in found]
        rows.setdefault((str(cost.graph), cost.length), [label, str(cost.length), *cells])
    blocks = [f"{size}-token blocks kept{order}" for order in ("", ", sorted") for size in (64, 16)]
    return {
        "title": "Graphs of the timed attention layer (measured)",
        "note": "On the queries and keys whose times follow. Recall is the share of the gold pairs, mass the attention "
        "probability inside the graph; blocks are counted among those that causality allows, in the order of the text "
        "and after sorting tokens by bucket (sort_tokens).",
        "columns": ["graph", "tokens", "sparsity", "recall", "mass", *blocks],
        "rows": list(rows.values()),
    }


def _pivot(title: str, note: str, down: str, across: str, cells: Mapping[Any, str]) -> dict[str, Any]:
    columns = sorted({column for _, column in cells})
    rows = dict.fromkeys(row for row, _ in cells)
    return {
        "title": title,
        "note": note,
        "columns": [down, *(f"{across} {column:g}" for column in columns)],
        "rows": [[row, *(cells.get((row, column), "–") for column in columns)] for row in rows],
    }


def _cell(table: Sequence[Mapping[str, Any]], method: str, sparsity: float) -> str:
    row = next((row for row in table if row["method"] == method and row["at"] == sparsity), None)
    if row is None:
        return "–"
    return f"{row['test_recall']:.3f} ({row['test_sparsity']:.3f}, w {row['window'] or '–'})"


def _flat(point: Point) -> dict[str, Any]:
    plain = to_plain(point)
    plain.pop("heads")
    return {**plain, "parameters": json.dumps(plain["parameters"])}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Table of methods by sparsities: recall on test, with the sparsity on test in brackets."""
    sparsities = sorted({row["at"] for row in table})
    lines = [
        "| method | " + " | ".join(f"recall at {s:g}" for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in table):
        cells = [_cell(table, method, sparsity) for sparsity in sparsities]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
