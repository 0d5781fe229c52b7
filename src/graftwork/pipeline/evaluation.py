"""The stages: convert, train, evaluate, report. Each takes what the one before returned, or the run that holds it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.core.example import Example, Examples
from graftwork.core.progress import Progress
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder
from graftwork.errors import ConfigError
from graftwork.evaluation.costs import measure_costs, sharing_copy
from graftwork.evaluation.language_modelling import text_batch, text_row
from graftwork.evaluation.prediction import predict
from graftwork.grafting.capabilities import Examines, Measures
from graftwork.grafting.conversion import restore
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.metrics.results import ResultRow, Results, Sample
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.surgery.sites import pretrained
from graftwork.tasks.loading import (
    evaluated_tasks,
    load_tasks,
)
from graftwork.tasks.sources import write_json_lines
from graftwork.tasks.task import Task, metric_directions, metric_notes

logger = logging.getLogger(__name__)

SAMPLES = 5
"""Inputs of each task whose answers are kept to look at."""
MEASURED_ROWS = 32
"""Inputs of each task on which a method's own numbers are measured."""


def evaluate(
    model: Converted | nn.Module,
    tasks: Sequence[str] | None = None,
    *,
    settings: EvaluationSettings | None = None,
    data: str | Path | None = None,
    run: str | Path | None = None,
    baseline: bool | None = None,
    name: str | None = None,
    point: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Results:
    """Score a model on tasks, with the dense model beside it if asked.

    Args:
        model: What `convert`, `train` or `load` returned, or an untouched model, measured by the same code.
        tasks: Task names or prepared JSON-lines files; those of `settings` if left out.
        settings: How answers are generated and scored.
        data: Folder that holds the tasks' files.
        run: Run folder; receives predictions and results, and lets a stopped evaluation go on.
        baseline: Measure the dense model too; overrides the settings.
        name: Label of the result; "converted" or "dense" if left out.
        point: Settings that the result belongs to, in a sweep.
        seed: Seed of the run, for the record.

    Returns:
        The results of this call; `results.json` in the run folder holds them with earlier ones.
    """
    settings = settings or EvaluationSettings()
    settings = replace(
        settings,
        tasks=settings.tasks if tasks is None else tuple(tasks),
        baseline=settings.baseline if baseline is None else baseline,
    )
    if not settings.tasks:
        raise ConfigError("Found no task to evaluate. Name at least one; `graftwork list tasks` shows them.")
    converted = model if isinstance(model, Converted) else _untouched(model)
    names = [member for task in settings.tasks for member in evaluated_tasks(task, settings.split)]
    loaded = load_tasks(names, data, settings.split, seed, lowercase=settings.lowercase, mode=settings.mode)
    folder = None if run is None else RunFolder(run)
    own = name or ("converted" if converted.methods else "dense")
    results = _measure(converted, loaded, settings, folder, own, point or {}, seed)
    variants = {own: converted.model}
    if settings.baseline and converted.methods:
        dense = replace(converted, model=sharing_copy(converted.model), methods=(), changes=())
        restore(dense)
        results = _measure(dense, loaded, settings, folder, "dense", {}, seed).merged(results)
        variants = {"dense": dense.model, **variants}
    results = replace(results, cost=measure_costs(variants, settings.cost_lengths))
    if folder is not None:
        earlier = Results.read(folder.results_file) if folder.results_file.exists() else None
        (results if earlier is None else earlier.merged(results)).write(folder.results_file)
    return results


def _untouched(model: nn.Module) -> Converted:
    from graftwork.grafting.conversion import _tokenizer_of

    return Converted(model, tokenizer=_tokenizer_of(model))


def _measure(
    converted: Converted,
    loaded: Sequence[tuple[Task, Examples]],
    settings: EvaluationSettings,
    folder: RunFolder | None,
    name: str,
    point: Mapping[str, Any],
    seed: int,
) -> Results:
    rows, samples = [], []
    for task, examples in loaded:
        if task.running_text:
            rows.append(text_row(converted, task.name, examples, settings, name, point, seed))
            continue
        chosen = examples if settings.limit is None else examples.first(settings.limit)
        output = None if folder is None else folder.predictions / task_file(task.name, name)
        with Progress(f"{task.name} ({name})", total=len(chosen.rows)) as progress:
            started = time.perf_counter()
            answers = predict(converted, chosen.rows, settings, output=output, advance=progress.advance)
            seconds = time.perf_counter() - started
        row = _row(task, chosen, answers, settings, name, point, seed, seconds)
        rows.append(_examined(converted, task, chosen, answers, settings, output, row))
        samples += [
            Sample(task.name, row.input, row.answers, {name: answer})
            for row, answer in zip(chosen.rows[:SAMPLES], answers, strict=False)
        ]
    return Results(
        model=str(pretrained(converted.model).name_or_path) or type(pretrained(converted.model)).__name__,
        method=converted.methods[-1].name if converted.methods else None,
        rows=tuple(rows),
        measures=_measures(converted, loaded, settings, name),
        samples=tuple(samples),
        changes={name: len(converted.changes)},
    )


def _examined(
    converted: Converted,
    task: Task,
    examples: Examples,
    answers: Sequence[str],
    settings: EvaluationSettings,
    output: Path | None,
    row: ResultRow,
) -> ResultRow:
    """The row with what the methods tell of the answers; what they tell of each one goes into a file."""
    for method in converted.methods:
        if not isinstance(method, Examines):
            continue
        found = method.examine(converted.model, required_tokenizer(converted), task, examples.rows, answers, settings)
        row = replace(row, scores={**row.scores, **found.scores})
        if output is not None and found.rows:
            write_json_lines(output.with_suffix(DETAILS_SUFFIX), found.rows)
    return row


def task_file(task: str, name: str) -> str:
    """File name of the predictions for one task and setting, below `predictions/`."""
    return f"{task.removesuffix('.jsonl').strip('/').replace('..', '_')}.{name.replace('/', '_')}.jsonl"


def _row(
    task: Task,
    examples: Examples,
    answers: Sequence[str],
    settings: EvaluationSettings,
    name: str,
    point: Mapping[str, Any],
    seed: int,
    seconds: float,
) -> ResultRow:
    metrics = task.official_metrics if settings.official else task.metrics
    return ResultRow(
        task=task.name,
        split=examples.split,
        label=name,
        scores=task.evaluate(answers, examples, official=settings.official),
        size=examples.size,
        settings=dict(point),
        seed=seed,
        ignored=examples.ignored,
        seconds=round(seconds, 3),
        higher_is_better=metric_directions(metrics),
        notes=metric_notes(metrics),
    )


def _measures(
    converted: Converted, loaded: Sequence[tuple[Task, Examples]], settings: EvaluationSettings, name: str
) -> dict[str, dict[str, float]]:
    """What the methods tell about a first batch of every task, averaged over tasks."""
    collected: dict[str, list[float]] = {}
    for method in converted.methods:
        if not isinstance(method, Measures):
            continue
        for task, examples in loaded:
            if task.running_text:
                batch = text_batch(converted, examples.rows, settings)
            else:
                batch = _batch(converted, examples.rows[:MEASURED_ROWS], settings)
            for key, value in method.measure(converted.model, batch).items():
                collected.setdefault(key, []).append(value)
    averaged = {key: sum(values) / len(values) for key, values in collected.items()}
    return {name: averaged} if averaged else {}


def _batch(converted: Converted, rows: Sequence[Example], settings: EvaluationSettings) -> dict[str, Any]:
    from graftwork.training.encoding import PadBatch, encode, padding_id

    inner = pretrained(converted.model)
    encoded = encode(
        rows,
        converted.tokenizer,
        inner,
        max_input_tokens=settings.max_input_tokens,
        max_target_tokens=settings.max_new_tokens,
    )
    batch = PadBatch(padding_id(converted.tokenizer))([encoded[index] for index in range(len(rows))])
    return {key: value.to(inner.device) for key, value in batch.items()}
