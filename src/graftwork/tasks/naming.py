"""Resolution of task names: a registered task, or a file of prepared lines, running text or a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftwork.errors import ConfigError
from graftwork.tasks.task import Task


def class_labels(names: Sequence[str], data: str | Path | None) -> tuple[str, ...] | None:
    """Return the classes of these tasks, for a classification head; None if all are answered in free text.

    Raises:
        ConfigError: If two tasks have different classes, which one head cannot serve.
    """
    found = {task.name: task.labels for name in names for task, _ in named_tasks(name, "") if task.labels}
    if len(set(found.values())) > 1:
        described = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in found.items())
        raise ConfigError(f"Found tasks with different classes ({described}). Train one model for each.")
    return next(iter(found.values()), None)


def named_tasks(name: str, split: str) -> list[tuple[Task, str]]:
    """Return the tasks that one name resolves to, each with the split to read."""
    from graftwork.tasks import get_task
    from graftwork.tasks.prepare import task_from_file
    from graftwork.tasks.tables import SUFFIXES, task_from_table
    from graftwork.tasks.wikitext import TEXT_SUFFIXES, task_from_text

    if name.endswith(TEXT_SUFFIXES):
        return [(task_from_text(Path(name)), split)]
    if name.endswith(SUFFIXES):
        task, examples = task_from_table(Path(name))
        return [(task, examples.split)]
    if is_file(name):
        return [(task, examples.split) for task, examples in task_from_file(Path(name))]
    return [(get_task(name), split)]


def is_file(name: str) -> bool:
    """True if a name is the path of a user's file."""
    from graftwork.tasks.tables import SUFFIXES
    from graftwork.tasks.wikitext import TEXT_SUFFIXES

    return name.endswith((".jsonl", ".json", *SUFFIXES, *TEXT_SUFFIXES))
