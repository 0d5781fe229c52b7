"""`graftwork list` and `graftwork show`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from graftwork.cli.options import settings_table
from graftwork.core.config import build, to_plain
from graftwork.core.example import Examples
from graftwork.core.messages import show
from graftwork.errors import ConfigError, UnknownNameError

KINDS = ("methods", "tasks", "mixtures", "families", "recipes")


def names(kind: str, method: str | None = None, *, full: bool = False) -> list[Any]:
    """Return the names of one kind; methods with their titles, families with the methods that can change them.

    Args:
        kind: One of `KINDS`.
        method: Only tasks, mixtures or recipes of this method.
        full: Add the reasons why a method cannot change a family.

    Raises:
        UnknownNameError: If there is no such kind or method.
        ConfigError: If methods have no entries of this kind, or this method has none.
    """
    if method is not None:
        return _names_of(kind, method)
    if kind == "methods":
        from graftwork.methods import NAMES, about

        return [
            {"name": name, "title": found.title, "paper": f"{found.paper.identifier} ({found.paper.year})"}
            for name, found in ((name, about(name)) for name in NAMES)
        ]
    if kind == "families":
        from graftwork.cli import families

        return list(families.rows() if full else families.short_rows())
    if kind == "recipes":
        from graftwork.settings.recipe import recipe_names

        return list(recipe_names())
    if kind in ("tasks", "mixtures"):
        from graftwork import tasks

        return list(tasks.TASKS if kind == "tasks" else tasks.MIXTURES)
    raise UnknownNameError("kind", kind, KINDS)


def _names_of(kind: str, method: str) -> list[Any]:
    from graftwork.methods import package

    origin = package(method)
    if kind == "recipes":
        found = [name for name in names(kind) if name.startswith(f"{method}/")]
    elif kind in ("tasks", "mixtures"):
        from graftwork import tasks

        found = list((tasks.TASKS if kind == "tasks" else tasks.MIXTURES).names(origin))
    else:
        raise ConfigError(f"Found --method beside {kind}. Expected it beside tasks, mixtures or recipes.")
    if not found:
        raise ConfigError(f"Found no {kind} that only {method} has. Leave --method out to see those that all share.")
    return found


def describe(
    name: str,
    *,
    count: int,
    data: str | None,
    split: str | None,
    mode: str,
    as_json: bool,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Print a method, a task, a mixture, a recipe, or the first examples of own data.

    Args:
        name: Its name.
        count: Number of examples of a task.
        data: Folder of the task's files; without it, the description of the task is printed.
        split: Split of the task; dev, or the task's first split, by default.
        mode: Formatting of the task: `fixed` or `reference`.
        as_json: Print JSON.
        fields: Mapping of the columns of own data.

    Raises:
        UnknownNameError: If the name is none of them.
    """
    from graftwork.methods import NAMES
    from graftwork.settings.recipe import load_recipe, recipe_names
    from graftwork.tasks import MIXTURES, TASKS
    from graftwork.tasks.naming import is_file

    if name in NAMES:
        _method(name, as_json)
    elif name in TASKS:
        _task(name, count, data, split, mode, as_json)
    elif name in MIXTURES:
        mixture = MIXTURES.get(name)
        show([{"task": task, "rate": rate} for task, rate in mixture.rates.items()], as_json=as_json)
    elif name in recipe_names():
        if as_json:
            show(to_plain(load_recipe(name)), as_json=True)
        else:
            print((files("graftwork") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").rstrip())
    elif is_file(name):
        from graftwork.settings.fields import DataFields
        from graftwork.tasks.loading import load_tasks

        mapping = build(DataFields, fields or {}, where="the columns")
        for _, examples in load_tasks([name], data, split or "train", 0, mode=mode, fields=mapping):
            _examples(examples, count, as_json)
    else:
        names = (*NAMES, *TASKS, *MIXTURES, *recipe_names())
        raise UnknownNameError("method, task, mixture or recipe", name, names)


def _method(name: str, as_json: bool) -> None:
    from graftwork.methods import about, package

    found, origin = about(name), package(name)
    settings = settings_table(found.config_class)
    if as_json:
        show({"name": name, "title": found.title, "paper": to_plain(found.paper), "settings": settings}, as_json=True)
        return
    card = Path(str(files(origin))) / "README.md" if origin else None
    print(card.read_text(encoding="utf-8").rstrip() if card is not None and card.exists() else found.title)
    print()
    show(settings, as_json=False)


def _task(name: str, count: int, data: str | None, split: str | None, mode: str, as_json: bool) -> None:
    from graftwork.tasks import get_task
    from graftwork.tasks.task import check_mode, metric_names

    task = get_task(name).in_mode(check_mode(mode))
    if data is None:
        description = {"description": task.description, "metrics": metric_names(task.metrics)}
        splits = {"splits": list(task.splits)} if task.splits else {}
        show({"name": name, **description, **splits}, as_json=as_json)
        return
    default = "dev" if task.exposes("dev") else task.splits[0]
    examples = task.load(Path(data), split or default)
    _examples(examples, count, as_json)


def _examples(examples: Examples, count: int, as_json: bool) -> None:
    rows = [
        {"id": row.key, "input": row.input, "target": row.target}
        | ({} if row.answers == (row.target,) else {"answers": list(row.answers)})
        for row in examples.rows[:count]
    ]
    if as_json:
        show(rows, as_json=True)
        return
    for row in rows:
        show(row, as_json=False)
        print()
