"""Compare graph predictors on a trained run: a table of recall at sparsity, curves, heat maps, pictures of one head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, DataError
from graftwork.grafting.converted import Converted
from graftwork.methods.sparsefinder.extraction import QueriesKeys, extract
from graftwork.methods.sparsefinder.graph_report.comparison import WINDOWS, Comparison, Setting, areas, grid
from graftwork.methods.sparsefinder.graph_report.comparison import recall_table as table_of
from graftwork.methods.sparsefinder.graph_report.costs import executor_costs
from graftwork.methods.sparsefinder.graph_report.pictures import write_graphs
from graftwork.methods.sparsefinder.graph_report.report import GraphReport
from graftwork.methods.sparsefinder.graph_report.scores import can_score, score_graphs
from graftwork.methods.sparsefinder.modules import sparsefinder_modules
from graftwork.methods.sparsefinder.phases import HELD_OUT, QUERIES_KEYS
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_tasks
from graftwork.training.data import training_data


def compare_graphs(
    converted: Converted,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    split: str = "dev",
    samples: int = 64,
    max_input_tokens: int = 128,
    methods: Sequence[str] | None = None,
    windows: Sequence[int | None] = WINDOWS,
    cost_lengths: Sequence[int] = (),
    output: str | Path | None = None,
) -> GraphReport:
    """Measure predictors and baselines on held-out text, half to choose settings on and half to report.

    Language models on running text are scored along the graphs as well.

    Args:
        converted: Model loaded from a run whose `project` phase is finished; its projections are used.
        tasks: Where held-out text comes from.
        data: Folder that holds the tasks' files.
        split: Split of the tasks; should hold nothing that was trained on.
        samples: Held-out sentences or chunks.
        max_input_tokens: Longer ones are cut.
        methods: Names of `grid` to compare; all if left out.
        windows: Bands to combine with each.
        cost_lengths: Lengths at which the executors are timed on one attention layer.
        output: Folder to write to; `RUN/graphs` if left out.

    Raises:
        ConfigError: If the run is no Sparsefinder run, or a method does not exist.
        DataError: If there are fewer than two held-out sentences.
    """
    folder = converted.folder
    grafts = sparsefinder_modules(converted.model)
    if folder is None or not grafts or not next(iter(grafts.values())).config.projects:
        raise ConfigError(
            "Found a model that is not from a run of sparsefinder with projections. Convert with a grouping, train, "
            "and load the run."
        )
    chosen = _chosen(grid(any(graft.causal for graft in grafts.values())), methods)
    train = QueriesKeys(folder.artifacts / QUERIES_KEYS)
    examples = [loaded for _, loaded in load_tasks(tasks, data, split, 0)]
    settings = TrainingSettings(tasks=tuple(tasks), max_input_tokens=max_input_tokens)
    dataset, collate = training_data(converted.model, converted.tokenizer, examples, settings, unlabelled=True)
    held_out = extract(converted.model, dataset, collate, folder.artifacts / HELD_OUT, samples=samples)
    if len(held_out) < 2:
        raise DataError(
            f"Found {len(held_out)} held-out sentences. Expected at least 2: one to choose on, one to report."
        )
    half = len(held_out) // 2
    tests = range(half, len(held_out))
    comparison = Comparison(grafts, train, held_out, tune=range(half), test=tests)
    with Progress("graphs", total=sum(map(len, chosen.values()))) as progress:
        points = comparison.run(chosen, windows, progress.advance)
    scores = ()
    if can_score(converted, dataset):
        scores = tuple(score_graphs(converted, comparison, points, dataset, collate, tests))
    costs = ()
    if cost_lengths:
        site = len(grafts) // 2
        costs = tuple(executor_costs(list(grafts.values())[site], train, held_out, site, cost_lengths))
    target = Path(output) if output is not None else folder.graphs
    report = GraphReport(tuple(table_of(points)), areas(points), points[0].gold_sparsity, target, scores, costs)
    write_graphs(report, points, comparison)
    return report


def _chosen(every: dict[str, list[Setting]], methods: Sequence[str] | None) -> dict[str, list[Setting]]:
    for name in methods or ():
        if name not in every:
            raise ConfigError(f"Found method {name!r}. Expected some of: {', '.join(every)}.")
    return {name: own for name, own in every.items() if methods is None or name in methods}
