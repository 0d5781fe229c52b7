"""The methods, one folder each, and the names that lead to them."""

from __future__ import annotations

from typing import Any

from graftwork.method import Method
from graftwork.registry import Registry

NAMES: Registry[type[Method[Any]]] = Registry(
    "method",
    {
        "sparsefinder": "graftwork.methods.sparsefinder:Sparsefinder",
        "topk": "graftwork.methods.topk:TopK",
    },
    group="graftwork.methods",
)
"""Every method, by its word; an installed package adds its own through the entry-point group `graftwork.methods`."""
