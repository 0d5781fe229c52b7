"""Model that a run starts from, before any training of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.core.config import build, to_plain
from graftwork.core.devices import Placing
from graftwork.core.messages import say
from graftwork.core.run_folder import RunFolder, is_run
from graftwork.core.stored_rows import join_rows
from graftwork.errors import ConfigError
from graftwork.grafting.capabilities import Calibrates
from graftwork.grafting.conversion import convert, convert_recorded
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.grafting.method import Method
from graftwork.methods import NAMES
from graftwork.pipeline.loading import load
from graftwork.pipeline.saved_tasks import prompt_task, with_saved_tasks
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.recipe import RunConfig, recorded_fields
from graftwork.tasks.loading import load_tasks, training_tasks
from graftwork.tasks.naming import NO_FIELDS, check_fields, class_labels, is_file
from graftwork.tasks.own_data.rows import is_plain_text
from graftwork.tasks.own_data.task_file import is_task_file


def build_method(entry: Mapping[str, Any]) -> Method[Any]:
    """Build a method from its name and settings, as recipes contain them.

    Raises:
        UnknownNameError: If there is no method of that name.
        ConfigError: If a setting is wrong.
    """
    cls = NAMES.get(str(entry["name"]))
    settings = {key: value for key, value in entry.items() if key != "name"}
    return cls(build(cls.config_class, settings, where=f"settings of {entry['name']}"))


def convert_checkpoint(
    model: str | Path,
    method: Method[Any],
    *,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    seed: int = 0,
    random_weights: bool = False,
    fields: DataFields = NO_FIELDS,
) -> Converted:
    """Load a checkpoint and graft a method onto it, calibrated on tasks if it needs examples.

    Args:
        model: Model folder, hub id, or a run whose model gets a further method.
        method: The method.
        tasks: Tasks that decide the classes of a new head and provide examples for calibration.
        data: Folder of the tasks' files.
        dtype: Data type of the weights; as in the checkpoint by default.
        device: As in `load`.
        device_map: As in `from_pretrained`.
        seed: Seed of a new classification head.
        random_weights: Initialise the model randomly if its folder contains a configuration without weights.
        fields: Mapping of the columns of own data.
    """
    check_fields(tasks, fields)
    labels = class_labels(tasks, data, fields)
    placing: Placing = {"dtype": dtype, "device": device, "device_map": device_map}
    loaded = load(model, labels=labels, seed=seed, random_weights=random_weights, **placing)
    if isinstance(method, Calibrates) and method.needs_calibration and tasks:
        loaded_tasks = load_tasks(tasks, data, "train", seed, fields=fields)
        rows = join_rows(part.rows for _, part in loaded_tasks)
        method = method.calibrate(loaded.model, required_tokenizer(loaded), rows)
    return convert(loaded, method)


def untrained(config: RunConfig, methods: Sequence[Method[Any]] = ()) -> Converted:
    """Load the model that a run starts from and convert it.

    Args:
        config: Configuration of the run; its model may be another run, with methods and weights of its own.
        methods: Methods of the run's model, those of the other run first.
    """
    begun = load(
        config.model,
        dtype=config.dtype,
        device_map=config.device_map,
        device=config.device,
        labels=labels_of(config),
        seed=config.seed,
        random_weights=config.random_weights,
    )
    for method in methods[len(begun.methods) :]:
        begun = convert_recorded(begun, method)
    return begun


def labels_of(config: RunConfig) -> tuple[str, ...] | None:
    """Class labels of the tasks of the training, else of the evaluation; None for free text."""
    if config.train is not None:
        return class_labels(training_tasks(config.train), config.data, config.train, split=config.train.split)
    if config.evaluate is None:
        return None
    return class_labels(config.evaluate.tasks, config.data, config.evaluate, split=config.evaluate.split)


def run_of(model: object) -> RunFolder | None:
    """Return the run folder that a model was loaded from, or that its path names; None if there is none."""
    if isinstance(model, Converted):
        return model.folder
    return RunFolder(model) if isinstance(model, (str, Path)) and is_run(model) else None


def with_input_fields(settings: EvaluationSettings, model: object, path: Path) -> EvaluationSettings:
    """Return settings of prediction with the mapping of the run's training, unless the inputs are plain text."""
    fixed = settings.prompt is not None or is_plain_text(path)
    return settings if fixed else with_run_fields(settings, run_of(model))


def with_text_fields(settings: EvaluationSettings, model: object) -> EvaluationSettings:
    """Return settings of prediction for texts: user turns of a chat if the run was trained on conversations."""
    run = run_of(model)
    trained = recorded_fields(run)
    if trained.text_field is not None and settings.prompt is None and (saved := prompt_task(run)) is not None:
        return replace(settings, prompt=saved)
    chat = settings.prompt is None and (trained.as_chat or trained.messages_field is not None)
    return replace(settings, as_chat=True) if chat else settings


def with_run_fields(settings: EvaluationSettings, run: RunFolder | None) -> EvaluationSettings:
    """Return evaluation settings with the mapping of columns of the run's training, unless they have their own.

    The chat template of the training is part of the run's tokenizer.
    """
    settings = with_saved_tasks(settings, run)
    files = [name for name in settings.tasks if is_file(name) and not is_task_file(name)]
    own = not (settings.tasks or settings.lm_eval) or bool(files)
    recorded = recorded_fields(run if own and not settings.mapped else None)
    inherited = recorded.given
    if run is None or not inherited or inherited == settings.given:
        return settings
    shown = {**inherited, **({"target_field": ", ".join(recorded.targets)} if recorded.targets else {})}
    say(f"Columns as in the training of {run.path}: {'; '.join(f'{name} {value}' for name, value in shown.items())}")
    return replace(settings, **{**inherited, **settings.given})


def load_varied(
    model: str | Path,
    method: Mapping[str, Any] | None,
    *,
    strict: bool = False,
    dtype: str | None = None,
    device_map: str | None = None,
    device: str | None = None,
    random_weights: bool = False,
) -> Converted:
    """Load a model with settings of its recorded method replaced.

    Args:
        model: Run folder, model folder or hub id.
        method: Settings to replace; with `name`, another method in place of the recorded one. None loads as recorded.
        strict: Fail if settings differ from the recorded ones.
        dtype: Data type of the weights.
        device_map: As in `from_pretrained`.
        device: As in `load`.
        random_weights: As in `load_model`.

    Raises:
        ConfigError: If the model records no method and `method` does not name one.
    """
    placing: Placing = {"dtype": dtype, "device": device, "device_map": device_map}
    if method is None:
        return load(model, strict=strict, random_weights=random_weights, **placing)
    recorded = load(model, random_weights=random_weights, **placing)
    changed = varied_method(recorded, method, str(model))
    others = [entry for entry in recorded.methods if entry.name != changed.name]
    return load(model, methods=[*others, changed], strict=strict, random_weights=random_weights, **placing)


def varied_method(recorded: Converted, given: Mapping[str, Any], model: str) -> Method[Any]:
    """Return the last recorded method with the given settings, or the method that they name.

    Raises:
        ConfigError: If there is no recorded method and none is named.
    """
    if not recorded.methods and "name" not in given:
        raise ConfigError(
            f"{model} records no method, so method.{next(iter(given))} has nothing to change. Set method.name."
        )
    last = None if "name" in given else recorded.methods[-1]
    base = {} if last is None else {"name": last.name, **to_plain(last.config)}
    return build_method({**base, **given})


def matches_recorded(converted: Converted, entry: Mapping[str, Any]) -> bool:
    """True if the model's last method is the recorded one with equal settings, apart from calibrated ones."""
    method = build_method(entry)
    last = converted.methods[-1] if converted.methods else None
    if last is None or last.name != method.name:
        return False
    return method.matches(last.config) if isinstance(method, Calibrates) else bool(method.config == last.config)
