"""Elementwise activations of top-k layers, each with its derivative in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError

_QUICK = 1.702
"""Slope c of quick GELU, s·σ(c·s)."""


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function and its vector–Jacobian product."""

    value: Callable[[Tensor], Tensor]
    """φ, from scores s to φ(s) of the same shape."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """Vector–Jacobian product: (∂L/∂φ(s), s) to ∂L/∂s = ∂L/∂φ(s) · φ′(s), all of one shape."""


def _quick_gelu_backward(gradient: Tensor, score: Tensor) -> Tensor:
    # φ(s) = s·σ(cs), so φ′(s) = σ(cs) + cs·σ(cs)·(1 − σ(cs))
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
# a copy, because callers modify the result in place
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
"""Elementwise activations by name, under the names of both transformers and torch."""


def activate(score: Float[Tensor, "*shape"], name: str) -> Float[Tensor, "*shape"]:
    """Apply the elementwise activation `name`.

    Raises:
        ConfigError: If no activation has this name.

    Example:
        >>> activate(torch.tensor([-1.0, 2.0]), "relu")
        tensor([0., 2.])
    """
    return find(name).value(score)


def find(name: str, *, softmax: bool = False) -> Activation:
    """Return the elementwise activation `name`.

    Args:
        name: Key of `ACTIVATIONS`.
        softmax: List "softmax" among the valid names in the error; for attention, which handles it separately.

    Raises:
        ConfigError: If no activation has this name.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    known = [*ACTIVATIONS, *(["softmax"] if softmax else [])]
    raise ConfigError(f"activation is {name!r}. Expected one of: {', '.join(sorted(known))}. Choose one of these.")
