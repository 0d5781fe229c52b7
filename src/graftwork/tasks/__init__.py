"""Tasks and mixtures by name; `graftwork.tasks.task` says what they are."""

from __future__ import annotations

from graftwork.registry import Registry
from graftwork.tasks.task import Example, Examples, Mixture, Task
from graftwork.tasks.unifiedqa import TASKS as _UNIFIEDQA
from graftwork.tasks.unifiedqa import unifiedqa_task
from graftwork.tasks.wikitext import TASKS as _WIKITEXT

__all__ = ["MIXTURES", "TASKS", "Example", "Examples", "Mixture", "Task", "get_task", "unifiedqa_task"]

_WORLD = {
    f"world/{name}": "graftwork.demo.tasks:TASKS"
    for name in ("facts", "choice", "keywords", "profile", "yesno", "reading")
}

TASKS: Registry[Task] = Registry("task", {**_UNIFIEDQA, **_WIKITEXT, **_WORLD}, group="graftwork.tasks")
MIXTURES: Registry[Mixture] = Registry("mixture", {}, group="graftwork.mixtures")


def get_task(name: str) -> Task:
    """The registered task of that name.

    Raises:
        UnknownNameError: If there is none; the message suggests the nearest name.
    """
    return TASKS.get(name)
