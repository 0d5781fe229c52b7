"""Error on double backward, which the fused backward passes do not implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def forbid_double_backward(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Attach a graph node that raises to each gradient, so that differentiating it again is not silently zero.

    `torch.autograd.function.once_differentiable` raises only if the upstream gradient itself requires grad.

    Args:
        gradients: Results of a backward pass, of any shapes.

    Returns:
        The gradients with the node attached if the backward pass runs with `create_graph=True`, else unchanged.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    end = torch.empty(0, requires_grad=True)
    return tuple(None if gradient is None else _with_error(gradient, end) for gradient in gradients)


def _with_error(gradient: Tensor, end: Tensor) -> Tensor:
    return cast(Tensor, _RaisesInBackward.apply(gradient, end))  # pyright: ignore[reportUnknownMemberType]


class _RaisesInBackward(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, end: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "Top-k layers were differentiated twice. Expected first derivatives only, because their backward pass is "
            "fused. Leave create_graph out, or use dense layers."
        )
