"""The methods, one folder each, and the names that lead to them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from graftwork.core.registry import Registry
from graftwork.grafting.method import About, Method

NAMES: Registry[type[Method[Any]]] = Registry(
    "method",
    {
        "cald": "graftwork.methods.cald:Cald",
        "regrad": "graftwork.methods.regrad:ReGrad",
        "sparsefinder": "graftwork.methods.sparsefinder:Sparsefinder",
        "topk": "graftwork.methods.topk:TopK",
        "wt5": "graftwork.methods.wt5:WT5",
    },
    group="graftwork.methods",
)
"""Every method, by its word; an installed package adds its own through the entry-point group `graftwork.methods`."""


def about(name: str) -> About:
    """Return name, publication and settings of a method, without its code where its package has a module `about`.

    Raises:
        UnknownNameError: If there is no method of that name; the message suggests the nearest one.
    """
    module = f"{package(name)}.about"
    if module != ".about" and find_spec(module) is not None:
        return import_module(module).ABOUT
    cls = NAMES.get(name)
    return About(cls.name, cls.title, cls.paper, cls.config_class, cls.summary, cls.families)


def package(name: str) -> str:
    """Return the package of a method, without importing the method's code; empty for a module outside a package.

    Raises:
        UnknownNameError: If there is no method of that name.
    """
    path = NAMES.path(name)
    module = NAMES.get(name).__module__ if path is None else path.partition(":")[0]
    spec = find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return module if is_package else module.rpartition(".")[0]
