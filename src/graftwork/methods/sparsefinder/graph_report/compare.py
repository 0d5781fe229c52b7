"""Comparison of graph predictors on a trained run: table of recall at sparsity, curves, heat maps, plots of a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, DataError
from graftwork.grafting.converted import Converted
from graftwork.methods.sparsefinder.config import BLOCKWISE
from graftwork.methods.sparsefinder.extraction import QueriesKeys, check_origin, extract
from graftwork.methods.sparsefinder.graph_report.comparison import Comparison, areas
from graftwork.methods.sparsefinder.graph_report.comparison import recall_table as table_of
from graftwork.methods.sparsefinder.graph_report.costs import ExecutorCost, executor_costs
from graftwork.methods.sparsefinder.graph_report.grid import WINDOWS, Setting, block_grid, grid
from graftwork.methods.sparsefinder.graph_report.pictures import write_graphs
from graftwork.methods.sparsefinder.graph_report.report import GraphReport
from graftwork.methods.sparsefinder.graph_report.scores import Score, has_perplexity, score_graphs
from graftwork.methods.sparsefinder.modules import sparsefinder_modules
from graftwork.methods.sparsefinder.phases import HELD_OUT, QUERIES_KEYS
from graftwork.settings.recipe import recorded_fields
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_tasks
from graftwork.training.data import training_data
from graftwork.training.running_text import TextBatch, TextChunks


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
    """Measure predictors and baselines on held-out text: settings are chosen on one half and reported on the other.

    A run that chooses key blocks is compared with windows, random graphs and other choices of blocks, by budget.
    Language models on running text are additionally scored by perplexity along the graphs.

    Args:
        converted: Model loaded from a run with a finished `project` phase, whose projections are used, or with a
            grouping that chooses key blocks.
        tasks: Tasks of the held-out text.
        data: Folder of the tasks' files.
        split: Split of the tasks; choose one that is disjoint from the training data.
        samples: Number of held-out sentences or chunks.
        max_input_tokens: Maximal number of tokens; longer inputs are truncated.
        methods: Names of `grid` to compare; all if omitted.
        windows: Band widths to combine with each method.
        cost_lengths: Lengths at which the executors are timed on one attention layer.
        output: Output folder; `RUN/graphs` if omitted.

    Raises:
        ConfigError: If the model is not from a Sparsefinder run with projections, or a method is unknown.
        DataError: If there are fewer than two held-out sentences.
    """
    folder = converted.folder
    grafts = sparsefinder_modules(converted.model)
    grouping = next(iter(grafts.values())).config.grouping if grafts else None
    blockwise = grouping in BLOCKWISE
    if folder is None or not grafts or not (blockwise or next(iter(grafts.values())).config.projects):
        raise ConfigError(
            "Found a model without learned projections. Expected a trained run of sparsefinder. Convert with a learned "
            "grouping, train, and load the run."
        )
    if not all(graft.predicts for graft in grafts.values()):
        raise ConfigError(f"{folder.path} has no learned graphs. Expected a trained run. Train it: graftwork train.")
    train: QueriesKeys | None = None
    if blockwise:
        every = block_grid(str(grouping), next(iter(grafts.values())).config.block_size)
    else:
        every = grid(any(graft.causal for graft in grafts.values()))
        train = QueriesKeys(folder.artifacts / QUERIES_KEYS)
        check_origin(train, converted.model)
    chosen = _chosen(every, methods)
    examples = [loaded for _, loaded in load_tasks(tasks, data, split, 0, fields=recorded_fields(folder))]
    settings = TrainingSettings(tasks=tuple(tasks), max_input_tokens=max_input_tokens)
    dataset, collate = training_data(converted.model, converted.tokenizer, examples, settings, unlabelled=True)
    held_out = extract(converted.model, dataset, collate, folder.artifacts / HELD_OUT, samples=samples)
    if len(held_out) < 2:
        raise DataError(
            f"Found {len(held_out)} held-out sentences. Expected at least 2: one to choose settings, one to report."
        )
    half = len(held_out) // 2
    tests = range(half, len(held_out))
    comparison = Comparison(grafts, train, held_out, tune=range(half), test=tests)
    with Progress("graphs", total=sum(map(len, chosen.values()))) as progress:
        points = comparison.run(chosen, windows, progress.advance)
    scores: tuple[Score, ...] = ()
    if isinstance(dataset, TextChunks) and isinstance(collate, TextBatch) and has_perplexity(converted):
        scores = tuple(score_graphs(converted, comparison, points, dataset, collate, tests))
    costs: tuple[ExecutorCost, ...] = ()
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
            raise ConfigError(f"Found method {name!r}. Expected any of: {', '.join(every)}.")
    return {name: own for name, own in every.items() if methods is None or name in methods}
