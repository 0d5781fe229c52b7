"""Settings of each method for the contract tests, and their expected number of changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graftwork.grafting.conversion import convert
from graftwork.grafting.method import Method
from tiny_models import LAYERS, TINY, Tiny, padded_batch, tiny_model


@dataclass(frozen=True)
class MethodSettings:
    """Contract settings of one method; each field maps a tiny model to settings or to a number."""

    identity: Callable[[Tiny], dict[str, Any]]
    """Settings with which the converted model is equivalent to the dense model."""
    real: Callable[[Tiny], dict[str, Any]]
    """Settings with which the converted model differs from the dense model."""
    changes: Callable[[Tiny], int]
    """Number of changed modules, with either settings."""


def _topk(attention_k: int, feed_forward_k: int) -> Callable[[Tiny], dict[str, Any]]:
    def settings(tiny: Tiny) -> dict[str, Any]:
        return {"attention_k": attention_k, **({"feed_forward_k": feed_forward_k} if tiny.feed_forward else {})}

    return settings


def _entmax(tiny: Tiny) -> dict[str, Any]:
    # graphs by position are undefined for cross-attention, so encoder–decoders compute all scores
    return {"alpha": 1.5} if tiny.kind == "both" else {"alpha": 1.5, "grouping": "random", "threshold": 0.7}


SETTINGS: dict[str, MethodSettings] = {
    # the model does not change: both settings are the identity
    "wt5": MethodSettings(lambda tiny: {}, lambda tiny: {"explanation_weight": 2.0}, lambda tiny: 0),
    "cald": MethodSettings(
        lambda tiny: (
            {"mixer": "linear", "window": 64}
            if tiny.kind == "decoder"
            else {"rank": 64, "positions": 64, "initialization": "identity"}
        ),
        lambda tiny: {"mixer": "linear", "window": 2} if tiny.kind == "decoder" else {"rank": 4},
        lambda tiny: tiny.attention,
    ),
    "regrad": MethodSettings(
        lambda tiny: {"rank": 2},
        lambda tiny: {"rank": 2, "b_std": 0.5},
        # three projections in the upper half of the layers
        lambda tiny: 3 * (LAYERS - LAYERS // 2),
    ),
    "sparsefinder": MethodSettings(lambda tiny: {"alpha": 1.0}, _entmax, lambda tiny: tiny.attention),
    "topk": MethodSettings(_topk(64, 24), _topk(2, 5), lambda tiny: tiny.attention + tiny.feed_forward),
}


FURTHER = {"cald": ("llama", "qwen2")}
"""Tiny models that a method converts with other settings than those of its listed families."""


@dataclass(frozen=True)
class Case:
    """One method on one family."""

    method_class: type[Method[Any]]
    name: str

    @property
    def tiny(self) -> Tiny:
        return TINY[self.name]

    @property
    def settings(self) -> MethodSettings:
        return SETTINGS[self.method_class.name]

    def identity(self) -> Method[Any]:
        return self.method_class(**self.settings.identity(self.tiny))

    def real(self) -> Method[Any]:
        return self.method_class(**self.settings.real(self.tiny))

    def model(self, **options: Any) -> Any:
        return tiny_model(self.name, **options)

    def converted(self, **options: Any) -> Any:
        return convert(self.model(**options), self.real()).model

    def batch(self, seed: int = 1) -> dict[str, torch.Tensor]:
        return padded_batch(self.name, seed=seed)
