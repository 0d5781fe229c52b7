"""Mixture files: named mixtures of task files and registered tasks, each with a rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.core.config import build, read_yaml
from graftwork.errors import ConfigError
from graftwork.tasks.own_data.task_file import is_task_file
from graftwork.tasks.task import Mixture

SUFFIX = ".mixture.yaml"


@dataclass(frozen=True, kw_only=True)
class MixtureFile:
    """Tasks that are trained together."""

    name: str = ""
    """Name of the mixture."""
    rates: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    """Rate by task: the path of a task file, relative to the mixture file, or a registered task; a number, 0 for
    evaluation only, or size."""


def is_mixture_file(name: str) -> bool:
    """True if a name is the path of a mixture file."""
    return name.endswith(SUFFIX)


def read_mixture_file(path: str) -> Mixture:
    """Read a mixture file, with the paths of its task files relative to the current folder.

    Raises:
        ConfigError: If the file does not exist or is no mixture file, or a task file is missing.
    """
    place = Path(path)
    if not place.is_file():
        raise ConfigError(f"Found no mixture file {path}. Expected a YAML file with name and rates; check the path.")
    found = build(MixtureFile, read_yaml(place), where=path)
    if not found.name or not found.rates:
        raise ConfigError(f"{path}: found no name or no rates. Expected both: a name, and a rate for each task.")
    rates: dict[str, float | str] = {}
    for name, rate in found.rates.items():
        member = str(place.parent / name) if is_task_file(name) else name
        if is_task_file(name) and not Path(member).is_file():
            raise ConfigError(f"{path}: found no task file {member}. Expected one that `graftwork train` wrote.")
        rates[member] = rate
    return Mixture(found.name, rates, f"mixture file {path}")
