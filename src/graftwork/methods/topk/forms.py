"""Top-k selection in models whose feed-forward layers are no modules of their own, or are experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftwork.methods.topk.modules import keep_topk
from graftwork.methods.topk.selection import select_topk
from graftwork.surgery.experts import run_experts
from graftwork.surgery.families import FeedForwardLayout


class TopKActivation(nn.Module):
    """Activation between two projections that keeps the k highest-ranked units of every token.

    For models that compute their feed-forward layer in the forward of a larger layer (BART, OPT, ALBERT, Bloom).
    Projections stay modules of the model, so the input of the output projection is stored as in the dense layer, but
    no other tensor of the layer's width: half of what a dense layer with GELU stores, and as much as one with ReLU.

    Args:
        activation: Activation module or function of the dense layer.
        k: Hidden units kept per token; None keeps all.
        selection: Ranking of the units, "score" or "abs_act"; None chooses "score".
    """

    def __init__(self, activation: Any, *, k: int | None, selection: str | None) -> None:
        super().__init__()
        # as a child, an activation module would appear twice in the model after a second conversion
        self.__dict__["activation"] = activation
        self.k = k
        self.selection = selection or "score"

    def forward(self, scores: Float[Tensor, "*tokens units"]) -> Float[Tensor, "*tokens units"]:
        """Return φ(s) for the k highest-ranked units of each token and zero for the others."""
        activation: Callable[[Tensor], Tensor] = self.__dict__["activation"]
        if self.k is None or self.k >= scores.shape[-1]:
            return activation(scores)
        if self.selection == "abs_act":
            activated = activation(scores)
            return keep_topk(activated, activated.abs(), self.k)
        # the activation of kept scores only, so that the others are not stored for the backward pass
        _, kept = select_topk(scores.detach(), self.k)  # [*tokens, k]
        taken = cast(Tensor, _Take.apply(scores, kept.long()))  # pyright: ignore[reportUnknownMemberType]
        activated = activation(taken)  # [*tokens, k]
        return torch.zeros_like(scores).scatter(-1, kept.long(), activated.to(scores.dtype))

    def extra_repr(self) -> str:
        """Settings shown by `print(model)`."""
        return f"k={self.k}, selection={self.selection}"


class _Take(torch.autograd.Function):
    """`scores.gather(-1, kept)`, whose backward pass stores positions only; that of `gather` stores all scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: Tensor) -> Tensor:
        ctx.width = scores.shape[-1]
        ctx.save_for_backward(kept)
        return scores.gather(-1, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        # [*tokens, k] → [*tokens, units]
        return gradient.new_zeros(*gradient.shape[:-1], ctx.width).scatter(-1, kept, gradient), None


class ExpertsEntry:
    """Replacement of the forward of experts that keeps, inside each expert, the k largest activations of every token.

    Units of gated experts are ranked by |φ(gate)·up|, those of plain experts by |φ(score)|.

    Args:
        experts: Experts with 3-D parameters.
        layout: Names of the parameters.
        k: Hidden units kept per token and expert; None keeps all.
    """

    def __init__(self, experts: nn.Module, layout: FeedForwardLayout, k: int | None) -> None:
        self.experts, self.proven_layout, self.k = experts, layout, k

    def __call__(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        indices: Int[Tensor, "tokens chosen"],
        weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Compute the weighted sum of the chosen experts.

        Args:
            hidden_states: Inputs of the layer.
            indices: Chosen experts of each token.
            weights: Router weights of the chosen experts.
        """
        return run_experts(self.experts, self.proven_layout, hidden_states, indices, weights, self._kept)

    def __repr__(self) -> str:
        return f"TopKExperts(k={self.k})"

    def _kept(self, hidden: Tensor) -> Tensor:
        if self.k is None or self.k >= hidden.shape[-1]:
            return hidden
        return keep_topk(hidden, hidden.abs(), self.k)
