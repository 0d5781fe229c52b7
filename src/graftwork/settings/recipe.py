"""Configuration of a complete run, as stored in recipe files and in `run.yaml`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from graftwork.core.config import build, merge, nest, read_yaml, to_plain, write_yaml
from graftwork.core.files import content_digest
from graftwork.core.readers import read_text
from graftwork.core.run_folder import RUN_FILE, RunFolder
from graftwork.errors import CheckpointMismatchError, ConfigError, UnknownNameError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.training import TrainingSettings

_DIGEST_COMMENT = "sha256 of the settings: "
"""Comment in `run.yaml` before the digest of the settings."""


@dataclass(frozen=True)
class Published:
    """Published number to compare a result with."""

    task: str
    """Task of the measurement."""
    metric: str
    """Name of our metric."""
    value: float
    """Published value."""
    tolerance: float
    """Maximum absolute difference at which a result counts as reproduced."""
    source: str
    """Reference: paper and table."""
    at: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Swept settings of the measurement, such as {method.feed_forward_k: 256}."""


@dataclass(frozen=True)
class RunConfig:
    """Complete configuration of a run."""

    model: str
    """Folder or hub id of the initial checkpoint."""
    method: Mapping[str, Any] | None = None
    """Name and settings of the method, such as {name: topk, attention_k: 64}; null trains and evaluates the model
    unconverted."""
    data: str | None = None
    """Folder with the files of the tasks; null for tasks from the hub."""
    train: TrainingSettings | None = None
    """Training settings; null skips training."""
    evaluate: EvaluationSettings | None = None
    """Evaluation settings; null skips evaluation."""
    over: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    """Sweep: every combination of these values is run, such as {method.feed_forward_k: [null, 256, 64]}."""
    seed: int = 0
    """Random seed of data order, dropout and subsets."""
    seeds: int = 1
    """Number of repetitions, with seeds seed, seed + 1, …; use 3 or more to report a spread."""
    dtype: str | None = None
    """Data type of the weights, such as bfloat16; null keeps that of the checkpoint, except on a CPU without
    instructions for it, where it is float32."""
    device_map: str | None = None
    """Device placement of transformers (auto, balanced), for models too large for one device; null uses one device."""
    device: str | None = None
    """Device (cpu, cuda, cuda:1, xpu, mps); null uses the accelerator if there is one. Leave it out of recipes that
    others run."""
    random_weights: bool = False
    """Initialise the model randomly if its folder contains a configuration without weights; choose it to train from
    scratch."""
    base_by_reference: bool = False
    """Link to the weights of `model` in place of a copy, for methods that leave them unchanged; a training that changes
    them writes a copy."""
    published: tuple[Published, ...] = ()
    """Published numbers to compare with in the report."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions of the software used; written with the run and ignored when read."""
    notes: tuple[str, ...] = ()
    """Deviations from the requested settings, such as a subset larger than its data; written with the run and ignored
    when read."""

    def __post_init__(self) -> None:
        """Validate the configuration.

        Raises:
            ConfigError: If the method has no name, or a swept setting does not exist.
        """
        if self.method is not None and "name" not in self.method:
            raise ConfigError(f"method is {dict(self.method)}. Expected a name and settings: {{name: topk, …}}.")
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}. Expected a whole number from 1.")
        for key, values in self.over.items():
            if not values:
                raise ConfigError(f"over holds no value for {key}. Give at least one, or leave the key out.")
            if key.partition(".")[0] not in ("method", "train", "evaluate", "model", "seed"):
                raise ConfigError(f"over holds {key!r}. Expected a setting such as method.feed_forward_k.")

    def points(self) -> list[dict[str, Any]]:
        """Points of the sweep, dotted key → value; one empty point if nothing is swept."""
        keys = list(self.over)
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*self.over.values())]

    def at(self, point: Mapping[str, Any]) -> RunConfig:
        """Return this configuration with the settings of one point applied, and without a sweep."""
        plain = to_plain(self) | {"over": {}}
        for key, value in point.items():
            plain = merge(plain, nest(key, value))
        return build(RunConfig, plain, where=f"the settings at {label(point)}")


def label(point: Mapping[str, Any]) -> str:
    """Short name of a point: "feed_forward_k=256"; "dense" if every method setting in it is null."""
    method = {key: value for key, value in point.items() if key.startswith("method.")}
    if method and all(value is None for value in method.values()):
        point = {key: value for key, value in point.items() if key not in method}
        return ",".join(["dense", *_parts(point)])
    return ",".join(_parts(point)) or "converted"


def _parts(point: Mapping[str, Any]) -> list[str]:
    return [f"{key.rpartition('.')[2]}={'off' if value is None else value}" for key, value in point.items()]


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, such as `topk/unifiedqa-t5-base_squad1_1`."""
    root = files("graftwork") / "recipes"
    return tuple(
        sorted(
            f"{folder.name}/{file.name.removesuffix('.yaml')}"
            for folder in root.iterdir()
            if folder.is_dir()
            for file in folder.iterdir()
            if file.name.endswith(".yaml")
        )
    )


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Load a recipe by its name, from a YAML file, or from a run folder.

    Raises:
        IncompleteRunError: If `name` is a folder without `run.yaml`.
        CheckpointMismatchError: If the `run.yaml` of a run was changed.
        UnknownNameError: If `name` is neither a recipe, a file nor a folder.
        ConfigError: If the recipe holds an unknown key or an invalid value.
    """
    path = Path(name)
    if str(name) in recipe_names():
        path = Path(str(files("graftwork") / "recipes" / f"{name}.yaml"))
    elif path.is_dir():
        path = RunFolder(path).require(RunFolder(path).run_file, "convert")
    elif not path.exists():
        if path.suffix in (".yaml", ".yml"):
            raise ConfigError(
                f"{path} does not exist. Give the path of a YAML file, or a name of `graftwork list recipes`."
            )
        raise UnknownNameError("recipe", str(name), recipe_names())
    values = _recorded(path) if path.name == RUN_FILE else read_yaml(path)
    return build(RunConfig, merge(values, overrides or {}), where=str(path))


def write_run(path: Path, config: RunConfig) -> None:
    """Write `run.yaml`: the complete configuration, the software versions, and a digest of the settings."""
    plain = to_plain(config) | {"versions": versions()}
    header = "The complete configuration of this run. `graftwork run FILE` repeats it."
    write_yaml(path, plain, header=f"{header}\n{_DIGEST_COMMENT}{_settings_digest(plain)}")


def _settings_digest(values: Mapping[str, Any]) -> str:
    # with versions and notes, which reports show
    return content_digest(values)


def _recorded(path: Path) -> dict[str, Any]:
    """Values of a `run.yaml`, compared with the digest in its comment; files of earlier versions have none."""
    values = read_yaml(path)
    for line in read_text(path, error=ConfigError).splitlines():
        comment, found, digest = line.partition(_DIGEST_COMMENT)
        if comment == "# " and found and digest.strip() != _settings_digest(values):
            raise CheckpointMismatchError(
                f"{path} has changed since the run wrote it; its values have another SHA-256 than the one in its "
                "comment. Restore it. For a run with other settings, pass them with --set, or copy the file, remove "
                "the comment and give the copy to `graftwork run`."
            )
    return values


def read_run(folder: RunFolder) -> RunConfig:
    """Configuration that a run recorded in its `run.yaml`.

    Raises:
        IncompleteRunError: If the run has none.
        CheckpointMismatchError: If the file was changed after the run wrote it.
        ConfigError: If the file has an unknown key or an invalid value.
    """
    file = folder.require(folder.run_file, "convert")
    return build(RunConfig, _recorded(file), where=str(file))


def recorded_fields(folder: RunFolder | None) -> DataFields:
    """Mapping of columns that a run was trained with, without its chat template, which its tokenizer contains."""
    if folder is None or not folder.run_file.is_file():
        return DataFields()
    trained = read_run(folder).train
    return DataFields() if trained is None else replace(trained.only_fields(), chat_template=None)


def add_notes(folder: RunFolder, notes: Sequence[str]) -> None:
    """Append to the notes of a run's `run.yaml`, each note once."""
    with folder.writing():
        config = read_run(folder)
        write_run(folder.run_file, replace(config, notes=tuple(dict.fromkeys((*config.notes, *notes)))))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    import platform
    from importlib.metadata import version

    names = ("graftwork", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
