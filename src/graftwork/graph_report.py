"""Compare graph predictors on a trained run: a table of recall at sparsity, curves, heat maps, pictures of one head."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftwork.checkpoint import load
from graftwork.config import to_plain
from graftwork.errors import ConfigError, DataError
from graftwork.files import replace_bytes, write_json, write_text
from graftwork.methods.sparsefinder.comparison import WINDOWS, Comparison, Point, Setting, areas, curves, grid
from graftwork.methods.sparsefinder.comparison import recall_table as table_of
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.extraction import QueriesKeys, extract
from graftwork.methods.sparsefinder.graphs import Graph, Pattern
from graftwork.methods.sparsefinder.modules import sparsefinder_modules
from graftwork.methods.sparsefinder.phases import QUERIES_KEYS
from graftwork.pipeline import load_tasks
from graftwork.progress import Progress
from graftwork.run_folder import RunFolder
from graftwork.training.run import training_data
from graftwork.training.settings import TrainingSettings

HELD_OUT = "held_out"
"""Folder of the queries and keys that settings are chosen and reported on, below `artifacts/`."""


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


def compare_graphs(
    run: str | Path,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    split: str = "dev",
    samples: int = 64,
    max_input_tokens: int = 128,
    methods: Sequence[str] | None = None,
    windows: Sequence[int | None] = WINDOWS,
    output: str | Path | None = None,
) -> GraphReport:
    """Measure predictors and baselines on held-out text, half to choose settings on and half to report.

    Args:
        run: A run whose `project` phase is finished; its projections are used.
        tasks: Where held-out text comes from.
        data: Folder that holds the tasks' files.
        split: Split of the tasks; should hold nothing that was trained on.
        samples: Held-out sentences or chunks.
        max_input_tokens: Longer ones are cut.
        methods: Names of `grid` to compare; all if left out.
        windows: Bands to combine with each.
        output: Folder to write to; `RUN/graphs` if left out.

    Raises:
        ConfigError: If the run is no Sparsefinder run, or a method does not exist.
        DataError: If there are fewer than two held-out sentences.
    """
    folder = RunFolder(run)
    converted = load(run)
    grafts = sparsefinder_modules(converted.model)
    if not grafts or not next(iter(grafts.values())).config.projects:
        raise ConfigError(f"{run} is no run of sparsefinder with projections. Convert with a grouping and train first.")
    train = QueriesKeys(folder.artifacts / QUERIES_KEYS)
    examples = [loaded for _, loaded in load_tasks(tasks, data, split, 0)]
    settings = TrainingSettings(tasks=tuple(tasks), max_input_tokens=max_input_tokens)
    dataset, collate = training_data(converted, examples, settings, unlabelled=True)
    held_out = extract(converted.model, dataset, collate, folder.artifacts / HELD_OUT, samples=samples)
    if len(held_out) < 2:
        raise DataError(
            f"Found {len(held_out)} held-out sentences. Expected at least 2: one to choose on, one to report."
        )
    half = len(held_out) // 2
    comparison = Comparison(grafts, train, held_out, tune=range(half), test=range(half, len(held_out)))
    chosen = _chosen(grid(any(graft.causal for graft in grafts.values())), methods)
    with Progress("graphs", total=sum(map(len, chosen.values()))) as progress:
        points = comparison.run(chosen, windows, progress.advance)
    target = Path(output) if output is not None else folder.path / "graphs"
    return _write(target, points, comparison, chosen)


def _chosen(every: dict[str, list[Setting]], methods: Sequence[str] | None) -> dict[str, list[Setting]]:
    for name in methods or ():
        if name not in every:
            raise ConfigError(f"Found method {name!r}. Expected some of: {', '.join(every)}.")
    return {name: own for name, own in every.items() if methods is None or name in methods}


def _write(
    folder: Path, points: Sequence[Point], comparison: Comparison, settings: Mapping[str, Sequence[Setting]]
) -> GraphReport:  # fmt: skip
    from graftwork.reporting.graphs import heat_maps, pareto

    table = table_of(points)
    report = GraphReport(tuple(table), areas(points), points[0].gold_sparsity, folder)
    write_json(folder / "points.json", [to_plain(point) for point in points])
    write_text(folder / "points.csv", _csv([_flat(point) for point in points]))
    write_json(
        folder / "table.json", {"table": table, "areas": dict(report.areas), "gold_sparsity": report.gold_sparsity}
    )
    write_text(folder / "table.md", _markdown(table))
    tests = [point for point in points if point.split == "test"]
    every = {name: [(p.sparsity, p.recall) for p in tests if p.method == name] for name in settings}
    replace_bytes(folder / "pareto.png", pareto(curves(points), every, report.gold_sparsity))
    best = _best(points, table)
    if best is not None:
        shown = {name: best.heads[name] for name in ("gold_sparsity", "sparsity", "recall", "exact")}
        replace_bytes(folder / "heads.png", heat_maps(shown, comparison.paths))
        replace_bytes(folder / "one_head.png", _one_head(best, comparison))
    return report


def _best(points: Sequence[Point], table: Sequence[Mapping[str, Any]]) -> Point | None:
    """The test point of the learned predictor with the best recall at the middle sparsity, to draw."""
    rows = [row for row in table if row["method"] in ("distance", "kmeans", "cos")]
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
    """The head whose recall is nearest to the mean, on the first test sentence."""
    from graftwork.reporting.graphs import one_head

    recall = torch.tensor(point.heads["recall"])
    site, head = divmod(int((recall - point.recall).abs().argmin()), recall.shape[1])
    grouping = {"cos": "distance"}.get(point.method, point.method)
    setting = Setting(point.method, {"grouping": grouping, **point.parameters})
    data = comparison.data["test"][site][0]
    graph = comparison.graph_of(setting, point.window, "test", site, 0)[0, head]
    key = data.key.repeat_interleave(data.query.shape[1] // data.key.shape[1], 1)
    scores = (data.query[0, head] * data.site.scale) @ key[0, head].mT
    gold = entmax(scores.masked_fill(~data.allowed[0, 0], -torch.inf))
    config = comparison.grafts[site].config
    pattern = Pattern(point.window, config.add_cls_mask, config.add_last_mask)
    fixed = Graph(1, replace(data.mask), pattern=pattern, query_real=data.query_real).dense()[0, 0]
    queries, keys = int(data.query_real[0].sum()), int(data.key_real[0].sum())
    title = f"{comparison.paths[site]}, head {head}: {point.method}, window {point.window}"
    return one_head(*(x[:queries, :keys].numpy() for x in (gold, graph, fixed)), title=title)


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
    """Methods by row, sparsities by column: recall on test, with the sparsity on test behind it."""
    sparsities = sorted({row["at"] for row in table})
    lines = [
        "| method | " + " | ".join(f"recall at {s:g}" for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in table):
        cells = []
        for sparsity in sparsities:
            row = next((row for row in table if row["method"] == method and row["at"] == sparsity), None)
            cells.append(
                "–" if row is None else
                f"{row['test_recall']:.3f} ({row['test_sparsity']:.3f}, w {row['window'] or '–'})"
            )  # fmt: skip
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
