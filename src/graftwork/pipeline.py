"""The stages: convert, train, evaluate, report. Each takes what the one before returned, or the run that holds it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.checkpoint import Converted, save
from graftwork.conversion import convert, restore
from graftwork.core.config import build, to_plain
from graftwork.core.example import Example, Examples
from graftwork.core.processes import first_process, meet, wait_for_all
from graftwork.core.progress import Progress
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder
from graftwork.costs import measure_costs, sharing_copy
from graftwork.errors import ConfigError, NothingConvertedError
from graftwork.language_modelling import text_batch, text_row
from graftwork.method import Method
from graftwork.metrics.results import ResultRow, Results, Sample
from graftwork.prediction import predict
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import add_notes, label
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import pretrained
from graftwork.tasks.loading import (
    check_tasks,
    evaluated_tasks,
    load_tasks,
    load_training,
    load_validation,
    training_tasks,
)
from graftwork.tasks.sources import write_json_lines
from graftwork.tasks.task import Task, metric_directions, metric_notes

logger = logging.getLogger(__name__)

SAMPLES = 5
"""Inputs of each task whose answers are kept to look at."""
MEASURED_ROWS = 32
"""Inputs of each task on which a method's own numbers are measured."""

__all__ = [
    "Converted",
    "Trained",
    "check_tasks",
    "convert",
    "evaluate",
    "evaluated_tasks",
    "load_tasks",
    "report",
    "restore",
    "sweep",
    "train",
    "training_tasks",
]


@dataclass(frozen=True)
class Trained:
    """A converted model after training."""

    converted: Converted
    phases: Mapping[str, Mapping[str, float]]
    """Phase to the closing numbers of its training: `train_loss`, `train_runtime` in seconds, …"""


def train(
    converted: Converted,
    settings: TrainingSettings,
    *,
    data: str | Path | None = None,
    run: str | Path,
    seed: int = 0,
    overwrite: bool = False,
    anew: Callable[[], Converted] | None = None,
) -> Trained:
    """Train a converted (or untouched) model through the phases of its methods.

    Called again after a stop, it goes on from the newest checkpoint and ends with the weights of an uninterrupted
    run; called again after the end, it loads what was trained.

    Args:
        converted: The model, its methods and its tokenizer; changed in place.
        settings: Tasks and how to train.
        data: Folder that holds the tasks' files.
        run: Run folder; receives `train/<phase>/` and, at the end, `model/`.
        seed: Seed of the order of examples and of dropout.
        overwrite: Start anew where the folder holds another training.
        anew: Makes the model as it was before any training, where `converted` was loaded from the run and may be what
            the other training led to.

    Raises:
        ConfigError: If there is nothing to train on, or the folder holds a training with other settings, or another
            process trains there.
    """
    from graftwork.training.run import mark_finished, train_phases

    folder = RunFolder(run)
    meet()
    loaded = load_training(settings, data, seed)
    validation = load_validation(settings, data, seed)
    # the processes of one training share the folder, and the first one holds it
    with folder.training() if first_process() else nullcontext():
        if loaded.notes and folder.run_file.exists():
            add_notes(folder.run_file, loaded.notes)
        converted, phases = train_phases(
            converted, settings, loaded.examples, folder, seed=seed, overwrite=overwrite, shares=loaded.shares,
            validation=validation, anew=anew,
        )  # fmt: skip
        if first_process():
            save(converted, folder.path)
            mark_finished(folder, phases)
        wait_for_all()
    return Trained(replace(converted, folder=folder), phases)


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


def sweep(
    converted: Converted,
    points: Sequence[Mapping[str, Any]],
    settings: EvaluationSettings,
    *,
    method: Method[Any] | None = None,
    data: str | Path | None = None,
    run: str | Path | None = None,
    seed: int = 0,
) -> Results:
    """Evaluate one model under several settings of its method; its weights are loaded once.

    Args:
        converted: The model.
        points: Dotted settings to values, such as {"method.feed_forward_k": 256}. A point that switches everything off
            is the dense model.
        settings: Tasks and how to generate.
        method: The method whose settings are varied; the model's own if left out.
        data: Folder that holds the tasks' files.
        run: Run folder.
        seed: Seed of the run, for the record.

    Raises:
        ConfigError: If a setting is not one of the method.
    """
    base = method or (converted.methods[-1] if converted.methods else None)
    if base is None:
        raise ConfigError(
            "Found no method on this model whose settings could be varied. Name one with --set method.name=topk, or "
            "convert the model first."
        )
    methods = [_method_at(base, point) for point in points]
    results: Results | None = None
    variants: dict[str, nn.Module] = {}
    inner = replace(settings, baseline=False, cost_lengths=())
    for point, changed in zip(points, methods, strict=True):
        current = _exchanged(converted, changed, point)
        variants[label(point)] = current.model
        part = evaluate(current, settings=inner, data=data, run=run, name=label(point), point=point, seed=seed)
        results = part if results is None else results.merged(part)
    if results is None:
        raise ConfigError("Found no point to evaluate. Give at least one value.")
    cost = measure_costs(variants, settings.cost_lengths)
    if cost and run is not None:
        folder = RunFolder(run)
        replace(Results.read(folder.results_file), cost=cost).write(folder.results_file)
    return replace(results, cost=cost)


def _method_at(base: Method[Any], point: Mapping[str, Any]) -> Method[Any]:
    varied = {key.removeprefix("method."): value for key, value in point.items() if key.startswith("method.")}
    if len(varied) < len(point):
        others = ", ".join(sorted(key for key in point if not key.startswith("method.")))
        raise ConfigError(f"Cannot vary {others} on a loaded model. Use `graftwork run`, which starts anew.")
    plain = {**to_plain(base.config), **varied}
    return type(base)(build(base.config_class, plain, where=f"the settings at {label(point)}"))


def _exchanged(converted: Converted, changed: Method[Any], point: Mapping[str, Any]) -> Converted:
    """The model with one method exchanged, around the same weights; the one passed in is left alone."""
    current = replace(converted, model=sharing_copy(converted.model), methods=(), changes=())
    restore(current)
    for method in (*(other for other in converted.methods if other.name != changed.name), changed):
        try:
            current = convert(current, method)
        except NothingConvertedError:
            logger.info("%s switches %s off; measuring the dense model.", label(point), method.name)
    _carry_over(converted.model, current.model)
    return current


@torch.no_grad()
def _carry_over(source: nn.Module, target: nn.Module) -> None:
    """Give a model that was converted anew what the methods had learned, where it has the same place for it."""
    learned = source.state_dict()
    for name, tensor in target.state_dict().items():
        before = learned.get(name)
        if before is not None and before.shape == tensor.shape and before.data_ptr() != tensor.data_ptr():
            tensor.copy_(before)


def report(
    runs: Sequence[str | Path], *, formats: Sequence[str] = ("md", "html"), output: Path | None = None
) -> list[Path]:
    """Write what runs measured as Markdown and as one self-contained page.

    Args:
        runs: Run folders; several are shown side by side.
        formats: "md", "html" or both.
        output: Folder for the report; the first run's by default.

    Returns:
        The files written.

    Raises:
        IncompleteRunError: If a run has no results.
    """
    from graftwork.reporting.render import write_report

    return write_report([RunFolder(run) for run in runs], formats=formats, output=output)


def _untouched(model: nn.Module) -> Converted:
    from graftwork.conversion import _tokenizer_of

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
        found = method.examine(converted.model, converted.tokenizer, task, examples.rows, answers, settings)
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
        rows, converted.tokenizer, inner, max_input_tokens=settings.max_input_tokens,
        max_target_tokens=settings.max_new_tokens,
    )  # fmt: skip
    batch = PadBatch(padding_id(converted.tokenizer))([encoded[index] for index in range(len(rows))])
    return {key: value.to(inner.device) for key, value in batch.items()}
