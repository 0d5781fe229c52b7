"""Conversion of pretrained encoders to linear-complexity attention while they are fine-tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods.cald.config import CaldConfig
    from graftwork.methods.cald.method import Cald

__all__ = ["Cald", "CaldConfig"]

API = ("functional",)
"""Modules and classes below the package that the API page documents, besides method and configuration."""


def __getattr__(name: str) -> Any:
    # the mathematics can be imported without the method, and the configuration without torch
    if name == "Cald":
        from graftwork.methods.cald.method import Cald

        return Cald
    if name == "CaldConfig":
        from graftwork.methods.cald.config import CaldConfig

        return CaldConfig
    raise AttributeError(f"module 'graftwork.methods.cald' has no attribute {name!r}")
