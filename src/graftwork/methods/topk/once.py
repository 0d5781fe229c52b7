"""Refusal of second derivatives, which the fused backward passes do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_once(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Give gradients a graph that ends in an error, so that differentiating them again is not silently zero.

    `torch.autograd.function.once_differentiable` does so only if the upstream gradient itself is differentiable.

    Args:
        gradients: What a backward pass computed.

    Returns:
        The gradients, as they are unless a graph of the backward pass is being made.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    end = torch.empty(0, requires_grad=True)
    return tuple(None if gradient is None else _Once.apply(gradient, end) for gradient in gradients)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, end: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "Top-k layers were differentiated twice. Expected first derivatives only, because their backward pass is "
            "fused. Put dense layers there, or leave create_graph out."
        )
