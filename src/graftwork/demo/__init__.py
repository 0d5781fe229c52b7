"""The offline world, tiny models pretrained on it, and a demonstration of every method."""

from __future__ import annotations

from graftwork.demo.offline import offline_world, shipped_model

__all__ = ["offline_world", "shipped_model"]
