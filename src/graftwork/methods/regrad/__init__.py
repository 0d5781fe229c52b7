"""ReGrad: documents retrieved as gradients at question time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods.regrad.config import ReGradConfig
    from graftwork.methods.regrad.method import ReGrad

__all__ = ["ReGrad", "ReGradConfig"]

API = (
    "text.requests",
    "answering.answerer.Answerer",
    "encoding.encoder.PassageEncoder",
    "encoding.adapters.AdapterEncoder",
    "encoding.adapter_training",
    "text.pair_making.PairMaker",
    "encoding.gradients",
)
"""Modules and classes below the package that the API page documents, besides method and configuration."""


def __getattr__(name: str) -> Any:
    # the bank can be used without torch, and the configuration too
    if name == "ReGrad":
        from graftwork.methods.regrad.method import ReGrad

        return ReGrad
    if name == "ReGradConfig":
        from graftwork.methods.regrad.config import ReGradConfig

        return ReGradConfig
    raise AttributeError(f"module 'graftwork.methods.regrad' has no attribute {name!r}")
