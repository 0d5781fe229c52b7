"""Mixture-of-experts layers whose experts are 3-D parameters, computed expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from graftwork.surgery.families import FeedForwardLayout

Selection = Callable[[Tensor], Tensor]
"""Maps hidden activations [tokens units] to those that are kept, of the same shape."""


def run_experts(
    experts: nn.Module,
    layout: FeedForwardLayout,
    hidden_states: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens chosen"],
    weights: Float[Tensor, "tokens chosen"],
    selection: Selection,
) -> Float[Tensor, "tokens hidden"]:
    """Compute y = Σ_e r_e · W₂ᵉ S(φ(W₁ᵉ x)) over the experts that the router has chosen for each token.

    Activations of one expert are recomputed in the backward pass, so that only its inputs are stored.

    Source: `transformers.integrations.moe`, whose experts interface defines names and layouts of the parameters.

    Args:
        experts: Module with the parameters of all experts.
        layout: Names of its parameters.
        hidden_states: Inputs x of the layer.
        indices: Chosen experts of each token; a number that is no expert is skipped.
        weights: Router weights r of the chosen experts.
        selection: S, applied to the activations of each expert; the identity for the dense layer.

    Returns:
        Weighted sum of the outputs of the chosen experts.
    """
    owner: Any = experts
    # unbind has one backward for all experts; indexing would allocate a gradient of all experts for each
    first, second = (getattr(owner, name).unbind(0) for name in layout.projections)
    biases = [
        getattr(owner, f"{name}_bias").unbind(0) if owner.has_bias else [None] * len(first)
        for name in layout.projections
    ]
    output = torch.zeros_like(hidden_states)

    def one(rows: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None) -> Tensor:
        scores = _linear(rows, w_in, b_in, transposed=owner.is_transposed)  # [rows units] or [rows 2·units]
        hidden = owner._apply_gate(scores) if owner.has_gate else owner.act_fn(scores)  # [rows units]
        result = _linear(selection(hidden), w_out, b_out, transposed=owner.is_transposed)  # [rows hidden]
        return owner.post_expert_norm(result) if owner.has_post_expert_norm else result

    for number, parts in enumerate(zip(first, biases[0], second, biases[1], strict=True)):
        tokens, place = torch.where(indices == number)  # [rows], [rows]
        if not len(tokens):
            continue
        rows = hidden_states[tokens]  # [rows hidden]
        if torch.is_grad_enabled():
            found = cast(Tensor, checkpoint(one, rows, *parts, use_reentrant=False))  # [rows hidden]
        else:
            found = one(rows, *parts)
        output = output.index_add(0, tokens, (found * weights[tokens, place, None]).to(output.dtype))
    return output


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """Product of rows [rows in] with a weight [out in], or [in out] if transposed."""
    return nn.functional.linear(rows, weight.t() if transposed else weight, bias)
