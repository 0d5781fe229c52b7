"""WT5: text-to-text models that generate a label and, on request, an explanation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods.wt5.config import WT5Config
    from graftwork.methods.wt5.method import WT5

__all__ = ["WT5", "WT5Config"]


def __getattr__(name: str) -> Any:
    # formats, tables and parsers can be imported without the method, and the configuration without torch
    if name == "WT5":
        from graftwork.methods.wt5.method import WT5

        return WT5
    if name == "WT5Config":
        from graftwork.methods.wt5.config import WT5Config

        return WT5Config
    raise AttributeError(f"module 'graftwork.methods.wt5' has no attribute {name!r}")
