"""Resolution of task names: a registered task, a file of rows or of running text, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftwork.core.compression import without_compression_suffix
from graftwork.errors import ConfigError, DataError
from graftwork.settings.fields import DataFields
from graftwork.tasks.own_data.task_file import is_task_file, read_task_file
from graftwork.tasks.task import Task

NO_FIELDS = DataFields()


def class_labels(
    names: Sequence[str], data: str | Path | None, fields: DataFields = NO_FIELDS, *, split: str = ""
) -> tuple[str, ...] | None:
    """Return the classes of these tasks, for a classification head; None if all are answered in free text.

    Args:
        names: Tasks.
        data: Folder of the tasks' files.
        fields: Mapping of the columns of own data.
        split: Split of data sets of the hub.

    Raises:
        ConfigError: If two tasks have different classes, which one head cannot serve.
        DataError: If own data has one class only.
    """
    found = {task.name: task.labels for name in names for task, _ in named_tasks(name, split, fields) if task.labels}
    if len(set(found.values())) > 1:
        described = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in found.items())
        raise ConfigError(f"Found tasks with different classes ({described}). Train one model for each.")
    for name, labels in found.items():
        if len(labels) < 2:
            raise DataError(
                f"{name}: found one class, {', '.join(labels)}; expected at least 2. Name the column of the "
                "classes with --label-field."
            )
    return next(iter(found.values()), None)


def named_tasks(name: str, split: str, fields: DataFields = NO_FIELDS) -> list[tuple[Task, str]]:
    """Return the tasks that one name resolves to, each with the split to read.

    Args:
        name: Registered task, path of a file, or `hub:ID`.
        split: Split to read; files have a split of their own.
        fields: Mapping of columns, for own data.
    """
    from graftwork.tasks import get_task
    from graftwork.tasks.own_data.explained_task import definition_of, explained_task
    from graftwork.tasks.own_data.task import own_task
    from graftwork.tasks.prepare import is_prepared, tasks_of_file
    from graftwork.tasks.wikitext import task_from_text

    if is_running_text(name):
        return [(task_from_text(Path(name)), split)]
    if is_task_file(name):
        return [explained_task(read_task_file(name), split)]
    if not is_file(name):
        return [(get_task(name), split)]
    if not (fields.mapped or fields.as_chat) and is_prepared(name):
        return tasks_of_file(Path(name))
    if fields.text_field is not None:
        return [explained_task(definition_of(name, fields), split)]
    return [own_task(name, split, fields)]


def is_file(name: str) -> bool:
    """True if a name is the path of a user's file, or a data set of the hub with the prefix `hub:`."""
    from graftwork.tasks import TASKS
    from graftwork.tasks.own_data.task import is_own_data

    if is_running_text(name) or is_task_file(name) or is_own_data(name):
        return True
    return "\0" not in name and name not in TASKS and Path(name).is_file()


def is_running_text(name: str) -> bool:
    """True if a name is the path of a plain text file, compressed or not."""
    from graftwork.tasks.wikitext import TEXT_SUFFIXES

    return without_compression_suffix(name).endswith(TEXT_SUFFIXES)


def check_fields(names: Sequence[str], fields: DataFields) -> None:
    """Check that a mapping of columns applies to one of the tasks.

    Raises:
        ConfigError: If columns are mapped and all tasks are registered ones, whose format is fixed.
    """
    fixed = [name for name in names if is_task_file(name)]
    if fields.given and fixed and len(fixed) == len(names):
        first = next(iter(fields.given))
        raise ConfigError(f"Found {first} beside {fixed[0]}, which names the columns itself. Leave the setting out.")
    if fields.given and not any(is_file(name) for name in names):
        first = next(iter(fields.given))
        raise ConfigError(
            f"Found {first} without own data: {', '.join(names) or 'no task'} has a fixed format. Expected the path of "
            "a file or hub:ID as a task; leave the setting out, or name your data."
        )


def applicable_fields(names: Sequence[str], fields: DataFields) -> DataFields:
    """Return a recorded mapping of columns if one of the tasks is own data, else an empty one."""
    return fields if any(is_file(name) and not is_task_file(name) for name in names) else NO_FIELDS


def task_named(name: str, mode: str = "fixed") -> Task:
    """Return a registered task, or the task of a task file.

    Raises:
        UnknownNameError: If the name is neither.
    """
    from graftwork.tasks import get_task

    task = named_tasks(name, "all")[0][0] if is_task_file(name) else get_task(name)
    return task.in_mode(mode)
