"""The methods, one folder each, and the names that lead to them."""

from __future__ import annotations

from typing import Any

from graftwork.core.registry import Registry
from graftwork.grafting.method import Method

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
