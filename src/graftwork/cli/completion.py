"""Completion of names in a shell; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable

VARIABLE = "_GRAFTWORK_COMPLETE"
"""Environment variable by which a shell asks for completions."""


def words() -> list[str]:
    """Return the words typed so far after `graftwork` if a shell asks for completions, else an empty list."""
    if VARIABLE not in os.environ:
        return []
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()[1:]


def kinds(incomplete: str) -> list[str]:
    """Return the kinds of `graftwork list` that start like this."""
    from graftwork.cli.catalogue import KINDS

    return _starting(KINDS, incomplete)


def methods(incomplete: str) -> list[str]:
    """Return the methods whose names start like this."""
    from graftwork.methods import NAMES

    return _starting(NAMES, incomplete)


def tasks(incomplete: str) -> list[str]:
    """Return the tasks whose names start like this."""
    from graftwork.tasks import TASKS

    return _starting(TASKS, incomplete)


def recipes(incomplete: str) -> list[str]:
    """Return the recipes whose names start like this."""
    from graftwork.settings.recipe import recipe_names

    return _starting(recipe_names(), incomplete)


def shown(incomplete: str) -> list[str]:
    """Return the names that `graftwork show` takes and that start like this."""
    from graftwork.tasks import MIXTURES

    return [*methods(incomplete), *tasks(incomplete), *_starting(MIXTURES, incomplete), *recipes(incomplete)]


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
