"""ReGrad: documents retrieved as gradients at question time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.methods.regrad.config import ReGradConfig
    from graftwork.methods.regrad.method import ReGrad

__all__ = ["ReGrad", "ReGradConfig"]


def __getattr__(name: str) -> Any:
    # the bank can be used without torch, and the configuration too
    if name == "ReGrad":
        from graftwork.methods.regrad.method import ReGrad

        return ReGrad
    if name == "ReGradConfig":
        from graftwork.methods.regrad.config import ReGradConfig

        return ReGradConfig
    raise AttributeError(f"module 'graftwork.methods.regrad' has no attribute {name!r}")
