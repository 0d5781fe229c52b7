"""Layers below the first adapted one: their outputs do not depend on the adapter, so a repeated pass reuses them."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from graftwork.methods.regrad.modules import adapters
from graftwork.surgery.sites import pretrained


@dataclass
class LowerLayers:
    """Input of the first adapted layer of one chunk, kept between its two forward passes.

    It needs hidden states [passages tokens hidden] in place of the computation of all layers below.

    Args:
        model: The converted model.
    """

    model: nn.Module
    _kept: Tensor | None = field(default=None, init=False)

    @contextmanager
    def kept(self) -> Generator[None]:
        """Keep the input of the first adapted layer of the forward pass inside."""
        below, first = split(self.model)
        if not below or any(module.training and has_dropout(module) for module in below):
            yield
            return
        plain: list[bool] = []

        def output(module: nn.Module, args: Any, result: Any) -> None:
            plain.append(isinstance(result, Tensor))

        def entering(module: nn.Module, args: tuple[Any, ...]) -> None:
            # layers that return more than hidden states cannot be left out
            if args and isinstance(args[0], Tensor) and len(plain) == len(below) and all(plain):
                self._kept = args[0].detach()

        hooks = [layer.register_forward_hook(output) for layer in below]
        hooks.append(cast(nn.Module, first).register_forward_pre_hook(entering))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def reused(self) -> Generator[None]:
        """Leave the layers below out of the forward pass inside, if their result is kept."""
        hidden = self._kept
        if hidden is None:
            yield
            return
        below, _ = split(self.model)
        own = [layer.__dict__.get("forward") for layer in below]

        # the result enters the first adapted layer as its argument, which checkpointing saves for the recomputation
        def kept(*_: Any, **__: Any) -> Tensor:
            return hidden

        for layer in below:
            layer.forward = kept
        try:
            yield
        finally:
            for layer, forward in zip(below, own, strict=True):
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.forward = forward


def split(model: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """Return the layers below the first adapted one, and that layer; none if there is no list of layers."""
    path = next(iter(adapters(model)))
    found = re.match(r"(.*?)\.(\d+)\.", path)
    if found is None:
        return [], None
    layers = pretrained(model).get_submodule(found[1])
    if not isinstance(layers, nn.ModuleList):
        return [], None
    first = int(found[2])
    return list(layers)[:first], layers[first]


def has_dropout(module: nn.Module) -> bool:
    """Return True if a module draws random numbers in training."""
    return any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.modules()) or bool(
        getattr(getattr(module, "self_attn", None), "attention_dropout", 0.0)
    )
