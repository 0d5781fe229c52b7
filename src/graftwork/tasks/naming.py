"""What a name on the command line or in a recipe stands for: a registered task, prepared lines, or a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftwork.errors import ConfigError
from graftwork.tasks.task import Task


def class_labels(names: Sequence[str], data: str | Path | None) -> tuple[str, ...] | None:
    """The classes that a head must tell apart for these tasks; None if they are answered in free text.

    Raises:
        ConfigError: If two tasks have different classes, which no one head can serve.
    """
    found = {task.name: task.labels for name in names for task, _ in named_tasks(name, "") if task.labels}
    if len(set(found.values())) > 1:
        described = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in found.items())
        raise ConfigError(f"Found tasks with different classes ({described}). Train one model for each.")
    return next(iter(found.values()), None)


def named_tasks(name: str, split: str) -> list[tuple[Task, str]]:
    """Tasks with the split to read, for one name."""
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
    """Whether a name stands for a file of the user's own."""
    from graftwork.tasks.tables import SUFFIXES
    from graftwork.tasks.wikitext import TEXT_SUFFIXES

    return name.endswith((".jsonl", ".json", *SUFFIXES, *TEXT_SUFFIXES))
