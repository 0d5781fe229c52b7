"""Registries of tasks and mixtures; `graftwork.tasks.task` defines both types."""

from __future__ import annotations

from graftwork.core.example import Example, Examples
from graftwork.core.plugins import method_modules
from graftwork.core.registry import Registry
from graftwork.tasks.glue import TASKS as _GLUE
from graftwork.tasks.imdb import TASKS as _IMDB
from graftwork.tasks.multihop import DOMAINS as _DOMAINS
from graftwork.tasks.multihop import TASKS as _MULTIHOP
from graftwork.tasks.task import Mixture, Task
from graftwork.tasks.translation import TASKS as _TRANSLATION
from graftwork.tasks.unifiedqa import TASKS as _UNIFIEDQA
from graftwork.tasks.unifiedqa import unifiedqa_task
from graftwork.tasks.wikitext import TASKS as _WIKITEXT

__all__ = ["MIXTURES", "TASKS", "Example", "Examples", "Mixture", "Task", "get_task", "unifiedqa_task"]

_WORLD = {
    f"world/{name}": "graftwork.tasks.world:TASKS"
    for name in ("facts", "choice", "keywords", "profile", "yesno", "reading")
}

_WORLD_MIXTURES = {f"world/pairs_{count}_explanations": "graftwork.tasks.world:MIXTURES" for count in (100, 1000)}

_MIXTURES: dict[str, Mixture | str] = {
    f"multihop/{domain}": Mixture(f"multihop/{domain}", {f"multihop/{name}": 1.0 for name in names}, f"{domain} domain")
    for domain, names in _DOMAINS.items()
}

_TABLES = method_modules("tables")

TASKS: Registry[Task] = Registry(
    "task",
    {**_UNIFIEDQA, **_GLUE, **_IMDB, **_MULTIHOP, **_TRANSLATION, **_WIKITEXT, **_WORLD},
    group="graftwork.tasks",
    tables=[f"{module}:TASKS" for module in (*_TABLES, *method_modules("explained_tables"))],
)
MIXTURES: Registry[Mixture] = Registry(
    "mixture",
    {**_MIXTURES, **_WORLD_MIXTURES},
    group="graftwork.mixtures",
    tables=[f"{module}:MIXTURES" for module in _TABLES],
)


def get_task(name: str) -> Task:
    """Return the registered task of that name.

    Raises:
        UnknownNameError: If no such task is registered; the message suggests the nearest name.
    """
    return TASKS.get(name)
