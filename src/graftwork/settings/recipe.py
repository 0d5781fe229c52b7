"""A whole run as one frozen configuration: what a recipe file and a run's `run.yaml` hold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from graftwork.core.config import build, merge, nest, read_yaml, to_plain, write_yaml
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, UnknownNameError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings


@dataclass(frozen=True)
class Published:
    """One number of a paper, to stand beside ours."""

    task: str
    """Task that it was measured on."""
    metric: str
    """Metric, by our name."""
    value: float
    """The published number."""
    tolerance: float
    """How far ours may be off and still count as reproduced."""
    source: str
    """Where it was published."""
    at: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it belongs to, such as {method.feed_forward_k: 256}."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    model: str
    """Folder or hub id of the checkpoint to start from."""
    method: Mapping[str, Any] | None = None
    """The method's name and its settings; null evaluates or trains the model as it is."""
    data: str | None = None
    """Folder that holds the tasks' files."""
    train: TrainingSettings | None = None
    """How to train; null does not train."""
    evaluate: EvaluationSettings | None = None
    """What to evaluate; null does not evaluate."""
    over: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings to try one after another, such as {method.feed_forward_k: [null, 256, 64]}."""
    seed: int = 0
    """Seed of data order, dropout and subsets."""
    seeds: int = 1
    """Repetitions, with seed, seed + 1, …"""
    dtype: str | None = None
    """Data type of the weights; null for what the checkpoint was saved in."""
    device_map: str | None = None
    """How to spread the model over devices, as transformers understands it (auto, balanced); null for one device."""
    published: tuple[Published, ...] = ()
    """Published numbers to show beside ours."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What the run was made with; written, never read."""
    notes: tuple[str, ...] = ()
    """What differed from what was asked for, such as a subset larger than its data; written, never read."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

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
        """Every combination of the swept settings, as dotted keys to values; an empty one if there are none."""
        keys = list(self.over)
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*self.over.values())]

    def at(self, point: Mapping[str, Any]) -> RunConfig:
        """This configuration with the settings of one point put in."""
        plain = to_plain(self) | {"over": {}}
        for key, value in point.items():
            plain = merge(plain, nest(key, value))
        return build(RunConfig, plain, where=f"the settings at {label(point)}")


def label(point: Mapping[str, Any]) -> str:
    """A point's short name: "feed_forward_k=256"; "dense" if every method setting in it is off."""
    method = {key: value for key, value in point.items() if key.startswith("method.")}
    if method and all(value is None for value in method.values()):
        point = {key: value for key, value in point.items() if key not in method}
        return ",".join(["dense", *_parts(point)])
    return ",".join(_parts(point)) or "converted"


def _parts(point: Mapping[str, Any]) -> list[str]:
    return [f"{key.rpartition('.')[2]}={'off' if value is None else value}" for key, value in point.items()]


def recipe_names() -> tuple[str, ...]:
    """Shipped recipes, as `topk/unifiedqa-t5-base_squad1_1`."""
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
    """Read a recipe by its shipped name, from a YAML file, or from a run folder.

    Raises:
        IncompleteRunError: If it is a folder without `run.yaml`.
        UnknownNameError: If it is neither.
        ConfigError: If it holds an unknown key or an impossible value.
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
    return build(RunConfig, merge(read_yaml(path), overrides or {}), where=str(path))


def write_run(path: Path, config: RunConfig) -> None:
    """Write `run.yaml`: the complete configuration and the versions it ran with."""
    plain = to_plain(config) | {"versions": versions()}
    write_yaml(path, plain, header="The complete configuration of this run. `graftwork run FILE` repeats it.")


def read_run(folder: RunFolder) -> RunConfig:
    """Configuration that a run recorded in its `run.yaml`.

    Raises:
        IncompleteRunError: If the run has none.
        ConfigError: If the file has an unknown key or an impossible value.
    """
    file = folder.require(folder.run_file, "convert")
    return build(RunConfig, read_yaml(file), where=str(file))


def add_notes(folder: RunFolder, notes: Sequence[str]) -> None:
    """Append to the notes of a run's `run.yaml`, each note once."""
    config = read_run(folder)
    write_run(folder.run_file, replace(config, notes=tuple(dict.fromkeys((*config.notes, *notes)))))


def versions() -> dict[str, str]:
    """Versions of what decides about results."""
    import platform
    from importlib.metadata import version

    names = ("graftwork", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
