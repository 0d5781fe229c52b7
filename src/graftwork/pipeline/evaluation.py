"""Evaluation of a model on tasks, with the dense model for comparison."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from graftwork.core.devices import move
from graftwork.core.example import Example, Examples
from graftwork.core.files import write_records
from graftwork.core.processes import is_main_process
from graftwork.core.progress import Progress
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder, absolute, task_file
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.evaluation.costs import measure_costs, sharing_copy
from graftwork.evaluation.language_modelling import text_batch, text_row
from graftwork.evaluation.prediction import predict_records
from graftwork.grafting.activity import check_active
from graftwork.grafting.capabilities import Examines, Measures
from graftwork.grafting.conversion import converted_of, restore, tokenizer_of
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.grafting.identity import weights_digest
from graftwork.grafting.model_card import write_card
from graftwork.grafting.precision import computed_on
from graftwork.metrics.results import ResultRow, Results, Sample, merge_results
from graftwork.pipeline.finishing import is_finished, training_folders
from graftwork.pipeline.harness.tasks import check_lm_eval, with_absolute_paths
from graftwork.pipeline.lengths import report_cuts, with_lengths
from graftwork.pipeline.loading import load
from graftwork.pipeline.start import with_run_fields
from graftwork.pipeline.workers import answering_pool
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import read_run, write_run
from graftwork.surgery.sites import pretrained
from graftwork.tasks.chat import use_chat_template
from graftwork.tasks.loading import evaluated_tasks, load_tasks
from graftwork.tasks.naming import check_fields
from graftwork.tasks.own_data.explained_task import ExplainedSource
from graftwork.tasks.own_data.task import OwnSource
from graftwork.tasks.task import Task, metric_directions, metric_notes
from graftwork.training.checkpoints import CHECKPOINT_PREFIX, last_checkpoint
from graftwork.training.encoding import PadBatch, encode, padding_id

if TYPE_CHECKING:
    from graftwork.pipeline.harness.scoring import Harness

logger = logging.getLogger(__name__)

SAMPLES = 5
"""Inputs of each task whose answers are kept for the report."""
MEASURED_ROWS = 32
"""Inputs of each task on which a method's own numbers are measured."""


def evaluate(
    model: Converted | nn.Module | str | Path,
    tasks: Sequence[str | Task] | None = None,
    *,
    settings: EvaluationSettings | None = None,
    data: str | Path | None = None,
    run: str | Path | None = None,
    baseline: bool | None = None,
    name: str | None = None,
    point: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Results:
    """Score a model on tasks, with the dense model for comparison if `baseline` is on.

    Args:
        model: Result of `convert`, `train` or `load`; an untouched model; or a run folder, model folder or hub id.
        tasks: Task names, data files, `hub:ID`, or `Task` objects; those of `settings` by default.
        settings: Generation and scoring.
        data: Folder of the tasks' files.
        run: Run folder, which receives predictions and results and allows resuming; given a path of a run as `model`,
            that run by default.
        baseline: Measure the dense model too; overrides the settings.
        name: Label of the result; "converted" or "dense" by default.
        point: Settings that the result belongs to, in a sweep.
        seed: Seed of the run, for the record.
        device: Device of the model, as in `load`; a model that is loaded already stays on its own by default.

    Returns:
        Results of this call; `results.json` in the run folder merges them with earlier ones.

    Raises:
        ConfigError: If no task is named.
    """
    settings = settings or EvaluationSettings()
    given = settings.tasks if tasks is None else tasks
    objects = tuple(task for task in given if isinstance(task, Task))
    settings = replace(
        settings,
        tasks=tuple(task for task in given if isinstance(task, str)),
        baseline=settings.baseline if baseline is None else baseline,
    )
    if settings.mapped:
        check_fields(settings.tasks, settings)
    converted, folder = resolve(model, run, device)
    settings = with_run_fields(settings, converted.folder or folder)
    check_active(converted.model, "evaluate the model")
    own = name or ("converted" if converted.methods else "dense")
    if folder is not None and isinstance(model, (str, Path)):
        warn_if_untrained(folder)
    results = Evaluation(settings, own, folder, point or {}, seed, converted.digest(), objects).run(converted, data)
    if folder is not None and is_main_process():
        record_evaluation(folder, converted, settings, data)
        _refresh_card(folder, converted)
    return results


def _refresh_card(folder: RunFolder, converted: Converted) -> None:
    """Write the new results into the model card of the run that the model was loaded from."""
    own = converted.folder
    if own is not None and own.path.resolve() == folder.path.resolve() and folder.model.exists():
        with folder.writing():
            write_card(folder, converted.methods)


def resolve(
    model: Converted | nn.Module | str | Path, run: str | Path | None, device: str | None = None
) -> tuple[Converted, RunFolder | None]:
    """Return the model, loaded if it is a path and moved if a device is given, and the run folder for results."""
    folder = None if run is None else RunFolder(run)
    if isinstance(model, (str, Path)):
        converted = load(model, device=device)
        return converted, folder or converted.folder
    move(model.model if isinstance(model, Converted) else model, device)
    return model if isinstance(model, Converted) else converted_of(model, tokenizer_of(model)), folder


def record_evaluation(
    folder: RunFolder, converted: Converted, settings: EvaluationSettings, data: str | Path | None
) -> None:
    """Write the settings of an evaluation into the run's `run.yaml`; its other sections stay as they are."""
    settings = with_absolute_paths(settings)
    with folder.writing():
        if folder.run_file.exists():
            recorded = read_run(folder)
        else:
            recorded = converted.configuration()
            if converted.folder is not None:
                # the checkpoint is a run, which brings its method along
                recorded = replace(recorded, method=None)
        chosen = recorded.data if data is None else absolute(data)
        notes = recorded.notes
        if recorded.train is not None and recorded.data not in (None, chosen):
            # the folder of the training's files is not the evaluation's to change
            notes = tuple(dict.fromkeys((*notes, f"evaluated with the files in {chosen}")))
            chosen = recorded.data
        write_run(folder.run_file, replace(recorded, evaluate=settings, data=chosen, notes=notes))


def warn_if_untrained(folder: RunFolder) -> None:
    """Log one line if `model/` of a run precedes an interrupted training."""
    for phase in training_folders(folder):
        checkpoint = last_checkpoint(phase)
        try:
            finished = is_finished(folder, phase.name)
        except CheckpointMismatchError as error:
            # the evaluation is of the weights in model/, whatever they come from
            logger.warning("%s", error)
            return
        if checkpoint is not None and not finished:
            logger.warning(
                "The training in %s is not finished: evaluating the model before training; `--checkpoints last` scores "
                "checkpoint %s.",
                folder.path,
                checkpoint.name.removeprefix(CHECKPOINT_PREFIX),
            )
            return


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its settings, its label, and the run folder that receives it."""

    settings: EvaluationSettings
    name: str
    """Label of the result."""
    folder: RunFolder | None = None
    point: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that the result belongs to, in a sweep."""
    seed: int = 0
    digest: str = ""
    """Digest of the weights of the evaluated model; empty if unknown."""
    objects: tuple[Task, ...] = ()
    """Tasks beside those that the settings name."""

    def run(self, converted: Converted, data: str | Path | None, harness: Harness | None = None) -> Results:
        """Score a model, and the dense model if the settings ask for it; merge the results into `results.json`.

        Args:
            converted: The model.
            data: Folder of the tasks' files.
            harness: Tasks of lm-eval that other models were scored on; loaded by default.

        Raises:
            ConfigError: If the settings name no task.
        """
        settings = with_run_fields(self.settings, converted.folder or self.folder)
        if not (settings.tasks or settings.lm_eval or self.objects):
            raise ConfigError("Found no task to evaluate. Name at least one; `graftwork list tasks` shows them.")
        names = [member for task in settings.tasks for member in evaluated_tasks(task, settings.split)]
        use_chat_template(converted.tokenizer, settings.chat_template)
        loaded = load_tasks(
            names,
            data,
            settings.split,
            self.seed,
            lowercase=settings.lowercase,
            mode=settings.mode,
            fields=settings,
        )
        for task in self.objects:
            chosen = task.in_mode(settings.mode)
            loaded.append((chosen, chosen.load(Path(data or "."), settings.split, seed=self.seed)))
        harness = harness or open_harness(settings)
        results = self._measure(converted, loaded, harness)
        variants: dict[str, nn.Module] = {self.name: converted.model}
        if settings.baseline and converted.methods:
            dense = replace(converted, model=sharing_copy(converted.model), methods=(), changes=())
            restore(dense)
            results = replace(self, name="dense", point={})._measure(dense, loaded, harness).merged(results)
            variants = {"dense": dense.model, **variants}
        if harness is not None:
            results = replace(results, comparisons=harness.comparisons("dense"))
        results = replace(results, cost=measure_costs(variants, settings.cost_lengths))
        if self.folder is not None and is_main_process():
            merge_results(self.folder, results)
        return results

    def _measure(
        self, converted: Converted, loaded: Sequence[tuple[Task, Examples]], harness: Harness | None
    ) -> Results:
        """Scores, samples and measurements of one model on all tasks, including those of lm-eval."""
        rows: list[ResultRow] = []
        samples: list[Sample] = []
        # one digest for all tasks: hashing takes seconds for a large model
        weights = "" if self.folder is None else weights_digest(converted.model)
        for task, examples in loaded:
            if task.running_text:
                if self.settings.workers is not None:
                    raise ConfigError(
                        f"workers is {self.settings.workers}, which has no effect on {task.name}, running text. Leave "
                        "it out."
                    )
                row = text_row(converted, task.name, examples, self.settings, self.name, self.point, self.seed)
                about = computed_on(converted.model)
                rows.append(replace(row, digest=self.digest, own=self._is_own(converted), **about))
                continue
            own = with_lengths(converted, self.settings, task, converted.folder or self.folder)
            row, answers = replace(self, settings=own)._score(converted, task, self._limited(examples), weights)
            rows.append(row)
            samples += [
                Sample(task.name, example.input, example.answers, {self.name: answer})
                for example, answer in zip(examples.rows[:SAMPLES], answers, strict=False)
            ]
        if harness is not None:
            write = None if self.folder is None else partial(_write_documents, self.folder, self.name)
            about = {"settings": dict(self.point), "seed": self.seed, "digest": self.digest}
            rows += [
                replace(row, **about, own=self._is_own(converted), **computed_on(converted.model))
                for row in harness.score(converted, self.name, write)
            ]
        inner = pretrained(converted.model)
        return Results(
            model=str(inner.name_or_path) or type(inner).__name__,
            method=converted.methods[-1].name if converted.methods else None,
            rows=tuple(rows),
            measures=self._measures(converted, loaded),
            samples=tuple(samples),
            changes={self.name: len(converted.changes)},
        )

    def _limited(self, examples: Examples) -> Examples:
        return examples if self.settings.limit is None else examples.first(self.settings.limit)

    def _score(self, converted: Converted, task: Task, examples: Examples, weights: str) -> tuple[ResultRow, list[str]]:
        """Predict all examples of a task and score the answers, with the methods' examination of each answer."""
        settings = self.settings
        cut = report_cuts(converted, f"evaluation on {task.name}", examples.rows, settings)
        output = None if self.folder is None else self.folder.predictions / task_file(task.name, self.name)
        with Progress(f"{task.name} ({self.name})", total=len(examples.rows)) as progress:
            started = time.perf_counter()
            records = predict_records(
                converted,
                examples.rows,
                settings,
                output=output,
                digest=weights,
                advance=progress.advance,
                pool=answering_pool(converted, examples.rows, settings),
            )
            seconds = time.perf_counter() - started
        metrics = task.official_metrics if settings.official else task.metrics
        answers = [str(record["prediction"]) for record in records]
        located = [record.get("answer") for record in records]
        scores = dict(task.evaluate(answers, examples, located=located, official=settings.official))
        for method in converted.methods:
            if isinstance(method, Examines):
                found = method.examine(
                    converted.model, required_tokenizer(converted), task, examples.rows, records, settings
                )
                scores |= found.scores
                if output is not None and found.rows and is_main_process():
                    write_records(output.with_suffix(DETAILS_SUFFIX), found.rows)
        row = ResultRow(
            task=task.name,
            split=examples.split,
            label=self.name,
            scores=scores,
            size=examples.size,
            settings=dict(self.point),
            seed=self.seed,
            ignored=examples.ignored,
            seconds=round(seconds, 3),
            higher_is_better=metric_directions(metrics),
            notes=(*metric_notes(metrics), *data_notes(task)),
            digest=self.digest,
            own=self._is_own(converted),
            cut=cut,
            **computed_on(converted.model),
        )
        return row, answers

    def _is_own(self, converted: Converted) -> bool:
        """True if the model was loaded from the run that receives the results."""
        own = converted.folder
        return own is not None and self.folder is not None and own.path.resolve() == self.folder.path.resolve()

    def _measures(self, converted: Converted, loaded: Sequence[tuple[Task, Examples]]) -> dict[str, dict[str, float]]:
        """Measurements of the methods on a first batch of every task, averaged over tasks."""
        collected: dict[str, list[float]] = {}
        for method in converted.methods:
            if not isinstance(method, Measures):
                continue
            for task, examples in loaded:
                if task.running_text:
                    batch = text_batch(converted, examples.rows, self.settings)
                else:
                    batch = self._batch(converted, examples.rows[:MEASURED_ROWS])
                for key, value in method.measure(converted.model, batch).items():
                    collected.setdefault(key, []).append(value)
        averaged = {key: sum(values) / len(values) for key, values in collected.items()}
        return {self.name: averaged} if averaged else {}

    def _batch(self, converted: Converted, rows: Sequence[Example]) -> dict[str, Any]:
        inner = pretrained(converted.model)
        encoded = encode(
            rows,
            converted.tokenizer,
            inner,
            max_input_tokens=self.settings.input_limit,
            max_target_tokens=self.settings.answer_limit,
        )
        batch = PadBatch(padding_id(converted.tokenizer))([encoded[index] for index in range(len(rows))])
        return {key: value.to(inner.device) for key, value in batch.items()}


def open_harness(settings: EvaluationSettings) -> Harness | None:
    """Tasks of lm-eval that the settings name; None if there are none."""
    check_lm_eval(settings)
    if not settings.lm_eval:
        return None
    # the import takes seconds, and lm-eval is an optional dependency
    from graftwork.pipeline.harness.scoring import Harness

    return Harness(settings)


def _write_documents(folder: RunFolder, label: str, task: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write answers and scores of every document of one task of lm-eval."""
    write_records(folder.predictions / task_file(task, label), records)


def data_notes(task: Task) -> tuple[str, ...]:
    """Format and columns of own data, for the results."""
    return (f"Data {task.description}",) if isinstance(task.source, OwnSource | ExplainedSource) else ()
