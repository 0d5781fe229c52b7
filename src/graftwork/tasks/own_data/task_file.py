"""Task files: own explained data as a task that every command accepts by the path of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from graftwork.core.config import build, read_yaml, to_plain, write_yaml
from graftwork.errors import ConfigError
from graftwork.settings.fields import DataFields

SUFFIX = ".task.yaml"


@dataclass(frozen=True, kw_only=True)
class TaskFile(DataFields):
    """Own explained data with everything that training, evaluation and prediction need to format it."""

    name: str = ""
    """Name of the task; results are stored under it."""
    source: str = ""
    """Path of the data file, relative to the task file, or hub:ID."""
    validation: float | None = None
    """Share of the rows that the training does not see; they are the splits validation and dev. null if the file is a
    single split."""
    explanations: int | None = None
    """Number of training rows that keep their explanation; null for all."""
    seed: int = 0
    """Seed of the choice of these rows, and of the rows that keep their explanation."""

    def __post_init__(self) -> None:
        """Validate the values.

        Raises:
            ConfigError: If the data or the mapping of its columns is missing.
        """
        super().__post_init__()
        if not (self.name and self.source and self.text_field):
            raise ConfigError("Found a task file without name, source or text_field. Expected all three.")
        if self.validation is not None and not 0 < self.validation < 1:
            raise ConfigError(f"validation is {self.validation}. Expected a share above 0 and below 1, or null.")

    def write(self, path: Path) -> None:
        """Write the task file; omitted values have their defaults."""
        plain = to_plain(self)
        defaults: Mapping[str, Any] = {entry.name: entry.default for entry in fields(self)}
        write_yaml(path, {key: value for key, value in plain.items() if value not in (defaults[key], [])})


def is_task_file(name: str) -> bool:
    """True if a name is the path of a task file."""
    return name.endswith(SUFFIX)


def read_task_file(path: str) -> TaskFile:
    """Read a task file, with the path of its data relative to the current folder.

    Raises:
        ConfigError: If the file does not exist or is no task file.
    """
    place = Path(path)
    if not place.is_file():
        raise ConfigError(f"Found no task file {path}. Expected the path of a file that `graftwork train` wrote.")
    found = build(TaskFile, read_yaml(place), where=path)
    if found.source.startswith("hub:"):
        return found
    outputs = tuple(str(place.parent / name) for name in found.teacher_outputs)
    return replace(found, source=str(place.parent / found.source), teacher_outputs=outputs)


def saved_tasks(folder: Path) -> Sequence[Path]:
    """Task files in a folder, sorted by name."""
    return sorted(folder.glob(f"*{SUFFIX}"))
