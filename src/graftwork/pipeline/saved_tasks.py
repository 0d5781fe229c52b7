"""Task files of a run: the own explained data that it was trained on, under a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from graftwork.core.messages import say
from graftwork.core.run_folder import RunFolder, absolute
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.own_data.task import HUB_PREFIX
from graftwork.tasks.own_data.task_file import SUFFIX, TaskFile, is_task_file, read_task_file, saved_tasks

FOLDER = "tasks"
"""Folder of the task files in a run."""


def with_labels(settings: TrainingSettings, own: Sequence[TaskFile]) -> TrainingSettings:
    """Return settings that record the labels of own explained data, which predictions need.

    Args:
        settings: Settings of the training.
        own: Its explained data.
    """
    # a task file has its labels
    if settings.text_field is None or settings.labels or settings.choices_field or len(own) != 1:
        return settings
    return replace(settings, labels=own[0].labels)


def write_task_files(folder: RunFolder, own: Sequence[TaskFile]) -> None:
    """Write one task file for each explained data set of a training, which other commands take by its name."""
    for each in own:
        path = folder.path / FOLDER / f"{each.name}{SUFFIX}"
        source = each.source if each.source.startswith(HUB_PREFIX) else absolute(each.source)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(each, source=source, teacher_outputs=tuple(map(absolute, each.teacher_outputs))).write(path)
        say(f"Wrote {path}; `graftwork evaluate {folder.path} --task {each.name}` evaluates it")


def with_saved_tasks(settings: EvaluationSettings, run: RunFolder | None) -> EvaluationSettings:
    """Return evaluation settings with the run's task files in place of their names and of their data files.

    A data file of the training is evaluated on the rows that were held out of it, if there are any.
    """
    if run is None or not settings.tasks or settings.mapped:
        return settings
    known: dict[str, Path] = {}
    for path in saved_tasks(run.path / FOLDER):
        definition = read_task_file(str(path))
        known[definition.name] = path
        known[definition.source if definition.source.startswith(HUB_PREFIX) else absolute(definition.source)] = path
    if not known:
        return settings
    tasks: list[str] = []
    for name in settings.tasks:
        path = known.get(name)
        if path is None and not is_task_file(name) and Path(name).is_file():
            path = known.get(absolute(name))
            if path is not None:
                say(f"{name}: the task {path} of the run's training")
        tasks.append(name if path is None else str(path))
    return replace(settings, tasks=tuple(tasks))


def prompt_task(run: RunFolder | None) -> str | None:
    """Path of the task file that formats texts for a run trained on own explained data; None for other runs."""
    found: Sequence[Path] = () if run is None else saved_tasks(run.path / FOLDER)
    return str(found[0]) if len(found) == 1 else None
