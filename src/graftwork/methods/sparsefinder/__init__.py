"""Sparsefinder: attention restricted to the pairs that a learned predictor of the entmax graph selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods.sparsefinder.config import SparsefinderConfig
    from graftwork.methods.sparsefinder.method import Sparsefinder

__all__ = ["Sparsefinder", "SparsefinderConfig"]

API = ("executors",)
"""Modules and classes below the package that the API page documents, besides method and configuration."""


def __getattr__(name: str) -> Any:
    # the mathematics can be imported without the method, and the configuration without torch
    if name == "Sparsefinder":
        from graftwork.methods.sparsefinder.method import Sparsefinder

        return Sparsefinder
    if name == "SparsefinderConfig":
        from graftwork.methods.sparsefinder.config import SparsefinderConfig

        return SparsefinderConfig
    raise AttributeError(f"module 'graftwork.methods.sparsefinder' has no attribute {name!r}")
