"""Feed-forward and attention layers that keep only the k best scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods.topk.config import TopKConfig
    from graftwork.methods.topk.method import TopK

__all__ = ["TopK", "TopKConfig"]

API = ("functional",)
"""Modules and classes below the package that the API page documents, besides method and configuration."""


def __getattr__(name: str) -> Any:
    # the mathematics can be imported without the method, and the configuration without torch
    if name == "TopK":
        from graftwork.methods.topk.method import TopK

        return TopK
    if name == "TopKConfig":
        from graftwork.methods.topk.config import TopKConfig

        return TopKConfig
    raise AttributeError(f"module 'graftwork.methods.topk' has no attribute {name!r}")
