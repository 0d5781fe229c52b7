"""The activations that top-k layers know, each with its derivative in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError

_QUICK = 1.702


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function and its vector–Jacobian product."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """Maps the gradient of the result and the argument to the gradient of the argument."""


def _quick_gelu_backward(gradient: Tensor, score: Tensor) -> Tensor:
    gate = torch.sigmoid(_QUICK * score)
    return gradient * (gate + _QUICK * score * gate * (1 - gate))


_RELU = Activation(F.relu, lambda gradient, score: torch.ops.aten.threshold_backward(gradient, score, 0))
_GELU = Activation(F.gelu, lambda gradient, score: torch.ops.aten.gelu_backward(gradient, score))
_GELU_TANH = Activation(
    lambda score: F.gelu(score, approximate="tanh"),
    lambda gradient, score: torch.ops.aten.gelu_backward(gradient, score, approximate="tanh"),
)
_SILU = Activation(F.silu, lambda gradient, score: torch.ops.aten.silu_backward(gradient, score))
_SOFTPLUS = Activation(F.softplus, lambda gradient, score: torch.ops.aten.softplus_backward(gradient, score, 1, 20))
_QUICK_GELU = Activation(lambda score: score * torch.sigmoid(_QUICK * score), _quick_gelu_backward)
# a copy, because callers go on in place
_IDENTITY = Activation(torch.clone, lambda gradient, score: gradient)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": _GELU,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_tanh": _GELU_TANH,
    "identity": _IDENTITY,
    "quick_gelu": _QUICK_GELU,
    "relu": _RELU,
    "silu": _SILU,
    "softplus": _SOFTPLUS,
    "swish": _SILU,
}
"""Elementwise activations by name; names of transformers and of torch side by side."""


def activate(score: Float[Tensor, "*shape"], name: str) -> Float[Tensor, "*shape"]:
    """Apply the elementwise activation called `name`.

    Raises:
        ConfigError: If no activation has this name.

    Example:
        >>> activate(torch.tensor([-1.0, 2.0]), "relu")
        tensor([0., 2.])
    """
    return find(name).value(score)


def find(name: str, *, softmax: bool = False) -> Activation:
    """Look an elementwise activation up; with `softmax`, say in the error that it would be possible too.

    Raises:
        ConfigError: If no activation has this name.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    known = [*ACTIVATIONS, *(["softmax"] if softmax else [])]
    raise ConfigError(f"activation is {name!r}. Expected one of: {', '.join(sorted(known))}. Choose one of these.")
