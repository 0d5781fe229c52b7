"""Run a whole recipe: convert, train, evaluate, over all points and seeds, stage by stage and resumable."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.devices import Placing
from graftwork.core.files import write_record
from graftwork.core.run_folder import RunFolder
from graftwork.core.stored_rows import join_rows
from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError, NothingConvertedError
from graftwork.grafting.capabilities import Calibrates
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, required_tokenizer, write_model
from graftwork.grafting.method import Method
from graftwork.metrics.results import ResultRow, Results, update_results
from graftwork.pipeline.evaluation import Evaluation, evaluate
from graftwork.pipeline.harness.tasks import check_lm_eval
from graftwork.pipeline.loading import load, recorded_names
from graftwork.pipeline.start import build_method, untrained, with_run_fields
from graftwork.pipeline.sweeps import sweep
from graftwork.pipeline.training import loading_device, train
from graftwork.reporting.curves import read_curves
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, label, write_run
from graftwork.tasks.loading import check_tasks, load_training, training_tasks
from graftwork.tasks.naming import is_file
from graftwork.training.checkpoints import CHECKPOINT_PREFIX, damage, is_complete

logger = logging.getLogger(__name__)


def run_recipe(config: RunConfig, output: str | Path, *, overwrite: bool = False) -> Results:
    """Carry out a recipe; a second call goes on where the first was stopped.

    A sweep over settings of the method, without training, loads the model once. Whatever else varies has a run of its
    own in a folder below.

    Args:
        config: What to run.
        output: Run folder.
        overwrite: Start anew where the folder holds another training.

    Returns:
        All results.

    Raises:
        ConfigError: If the recipe neither trains nor evaluates.
    """
    folder = RunFolder(output)
    if config.train is None and config.evaluate is None:
        raise ConfigError(
            "Found neither train nor evaluate in this recipe, so there is nothing to run. Add one of them."
        )
    points = config.points()
    _check(config, points)
    on_loaded_model = config.train is None and all(key.startswith("method.") for key in config.over)
    if (on_loaded_model or not config.over) and config.seeds == 1:
        return _run_one(config, folder, overwrite)
    with folder.writing():
        write_run(folder.run_file, config)
    results: Results | None = None
    for number in range(config.seeds):
        for point in points:
            single = replace(config.at(point), over={}, seed=config.seed + number, seeds=1, published=())
            name = ",".join(
                filter(None, [label(point) if point else "", f"seed={single.seed}" if config.seeds > 1 else ""])
            )
            logger.info("%s", name)
            part = _run_one(single, RunFolder(folder.path / name.replace("/", "_")), overwrite, label(point), point)
            results = part if results is None else results.merged(part)
    if results is None:
        raise ConfigError("Found no point to run. Give at least one value for every swept setting.")
    with folder.writing():
        results.write(folder.results_file)
    return results


def _check(config: RunConfig, points: Sequence[Mapping[str, Any]]) -> None:
    """Find wrong names and settings before the first model is loaded, not after hours at the last point."""
    for point in points:
        _method(config.at(point))
    if config.train is not None:
        check_tasks(training_tasks(config.train), config.data, config.train, split=config.train.split)
    if config.evaluate is not None:
        chosen = config.evaluate
        if config.train is not None and not chosen.mapped and any(map(is_file, chosen.tasks)):
            chosen = replace(chosen, **{**config.train.given, **chosen.given})
        check_tasks(chosen.tasks, config.data, chosen, split=chosen.split)
        check_lm_eval(chosen)


def _run_one(
    config: RunConfig,
    folder: RunFolder,
    overwrite: bool,
    name: str | None = None,
    point: Mapping[str, Any] | None = None,
) -> Results:
    converted = _start(config, folder)
    with folder.writing():
        write_run(folder.run_file, config)
    training: dict[str, Mapping[str, float]] = {}
    if config.train is not None:
        trained = train(
            converted,
            config.train,
            data=config.data,
            run=folder.path,
            seed=config.seed,
            overwrite=overwrite,
            device=config.device,
        )
        converted, training = trained.converted, dict(trained.phases)
    if config.evaluate is None:
        results = Results(config.model, None if config.method is None else str(config.method["name"]))
    elif config.over:
        results = sweep(
            converted,
            config.points(),
            config.evaluate,
            method=_method(config),
            data=config.data,
            run=folder.path,
            seed=config.seed,
        )
    else:
        results = evaluate(
            converted,
            settings=config.evaluate,
            data=config.data,
            run=folder.path,
            name=name,
            point=point,
            seed=config.seed,
        )
    curves = read_curves(folder)
    if curves:
        results = replace(results, curves={name or "training": curves})
    newer = results
    return update_results(
        folder,
        lambda earlier: replace((earlier or newer).merged(newer), model=config.model, training=training),
    )


def _start(config: RunConfig, folder: RunFolder) -> Converted:
    """Model to train or evaluate: the one in the run folder if this recipe wrote it, else a fresh conversion."""
    method = _method(config)
    device = config.device if config.train is None else loading_device(config.train, config.device)
    if folder.model.exists() and folder.conversion_file.exists():
        existing = load(folder.path, dtype=config.dtype, device_map=config.device_map, device=device)
        recorded = [(entry.name, to_plain(entry.config)) for entry in existing.methods]
        if _same(existing, method, config.model):
            return existing
        if config.train is not None:
            raise ConfigError(
                f"{folder.path} holds a model converted with other settings ({recorded}). Give another run folder."
            )
    converted = untrained(replace(config, device=device))
    if method is not None and not config.over:
        if isinstance(method, Calibrates) and method.needs_calibration and config.train is not None:
            drawn = load_training(config.train, config.data, config.seed)
            rows = join_rows(part.rows for part in drawn.examples)
            method = method.calibrate(converted.model, required_tokenizer(converted), rows)
        try:
            converted = convert(converted, method)
        except NothingConvertedError:
            # a point of a sweep may switch everything off: that is the dense model
            logger.info("%s is switched off here; running the dense model.", method.name)
    if config.train is not None:
        with folder.training():
            write_model(converted, folder, config=config, by_reference=config.base_by_reference or None)
    return converted


def _same(existing: Converted, method: Method[Any] | None, model: str) -> bool:
    """True if the model in the run folder is the recipe's model with the recipe's method."""
    made = [] if method is None else [method.name]
    if [entry.name for entry in existing.methods] != [*recorded_names(model), *made]:
        return False
    if method is None:
        return True
    recorded = existing.methods[-1].config
    return method.matches(recorded) if isinstance(method, Calibrates) else bool(method.config == recorded)


def _method(config: RunConfig) -> Method[Any] | None:
    return None if config.method is None else build_method(config.method)


def evaluate_checkpoints(
    run: str | Path,
    which: str,
    settings: EvaluationSettings,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    dtype: str | None = None,
    device_map: Any = None,
    device: str | None = None,
) -> Results:
    """Evaluate the checkpoints that a training left in a run, each labelled by its step.

    Args:
        run: Run folder.
        which: "all", "last", "best" (highest first score of the first task, ties broken by the next score, then by the
            earlier step; written to `best.json`), or steps such as "12000,14000" (the nearest checkpoint of each).
        settings: Tasks and generation.
        data: Folder of the tasks' files.
        output: Run folder for results; the run itself by default.
        dtype: Data type of the weights.
        device_map: As in `from_pretrained`.
        device: As in `load`.

    Raises:
        ConfigError: If `which` is none of these.
        IncompleteRunError: If there is no checkpoint.
    """
    steps = [word.strip() for word in which.split(",")]
    if which not in ("all", "last", "best") and not all(word.isdigit() for word in steps):
        raise ConfigError(f"Found checkpoints {which!r}. Expected all, last or best, or steps such as 12000,14000.")
    settings = with_run_fields(settings, RunFolder(run))
    found = _checkpoints(RunFolder(run))
    if which not in ("all", "last", "best"):
        nearest = {min(found, key=lambda one, step=int(word): abs(one[0] - step)) for word in steps}
        found = sorted(nearest)
    placing: Placing = {"dtype": dtype, "device": device, "device_map": device_map}
    recorded = load(run, **placing).methods
    parts: list[Results] = []
    place = RunFolder(output or run)
    for step, folder in found[-1:] if which == "last" else found:
        if problem := damage(folder):
            raise CheckpointMismatchError(f"{folder} is damaged ({problem}). Choose another one, or train again.")
        converted = load(folder, methods=recorded, **placing)
        parts.append(Evaluation(settings, f"step {step}", place, digest=converted.digest()).run(converted, data))
    if which == "best":
        (step, folder), best = max(zip(found, parts, strict=True), key=lambda one: _ranking(one[1].rows[0]))
        row = best.rows[0]
        chosen = {"step": step, "checkpoint": str(folder), "task": row.task, "split": row.split}
        with place.writing():
            write_record(place.best_file, {**chosen, "scores": dict(row.scores), "digest": row.digest})
        return best
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    return merged


def _ranking(row: ResultRow) -> list[float]:
    """Scores in order, negated where lower is better; NaN ranks last."""
    signed = [value if row.higher_is_better.get(name, True) else -value for name, value in row.scores.items()]
    return [-math.inf if math.isnan(value) else value for value in signed]


def _checkpoints(folder: RunFolder) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of the last phase that has any, in order."""
    for phase in sorted((folder.path / "train").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True):
        names = [path for path in phase.glob(f"{CHECKPOINT_PREFIX}*") if path.name[len(CHECKPOINT_PREFIX) :].isdigit()]
        whole = sorted((int(path.name[len(CHECKPOINT_PREFIX) :]), path) for path in names if is_complete(path))
        if whole:
            return whole
    raise IncompleteRunError(f"{folder.path} holds no checkpoint. `graftwork train` writes one every train.save_steps.")
