"""Top-k feed-forward layers, plain and gated: the public functions and their autograd function."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.topk import custom_ops
from graftwork.methods.topk import selection as select
from graftwork.methods.topk.activations import find
from graftwork.methods.topk.double_backward import forbid_double_backward
from graftwork.methods.topk.dropout import draw_seed, precise
from graftwork.methods.topk.feed_forward_passes import Kept, Layer, Needs, Settings, backward, forward
from graftwork.surgery.tracing import refuse_trace, tracing

PLAIN_SELECTIONS = ("score", "abs_act")
"""Values of `selection` for plain layers."""
GATED_SELECTIONS = ("gate", "abs_act", "product")
"""Values of `selection` for gated layers."""


def topk_feed_forward(
    x: Float[Tensor, "*tokens hidden"],
    w_in: Float[Tensor, "units hidden"],
    w_out: Float[Tensor, "out units"],
    b_in: Float[Tensor, " units"] | None = None,
    b_out: Float[Tensor, " out"] | None = None,
    *,
    k: int | None,
    activation: str,
    selection: str = "score",
    dropout: float = 0.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*tokens out"]:
    """Compute y = Σ_{j∈T} φ(h_j) w_out[:, j] + b_out, with T the k highest-ranked units of each token.

    h = w_in x + b_in. A feed-forward layer is attention with learned keys (`w_in`) and values (`w_out`). The backward
    pass stores only the input and the k kept scores with their positions, and reads only the kept rows of the weights.

    Source: Gupta et al. 2021, section 2; `ag1988/top_k_attention`, `nocache_attention.py` and `unifiedqa/`.
    Differs from it: biases; any activation; sparse products; chunks never exceed their size; dropout masks are
    regenerated from a seed per call; only required gradients are computed.

    Args:
        x: Token vectors, any leading axes.
        w_in: Input weights, one row per hidden unit.
        w_out: Output weights, one column per hidden unit; its dtype may be wider than that of `x`, as in T5, and is the
            dtype of the result.
        b_in: Biases of the hidden units; included in the ranking.
        b_out: Biases of the result.
        k: Units kept per token. None, or at least the number of units, gives the dense layer, which stores only `x` and
            recomputes activations in the backward pass.
        activation: Name in `ACTIVATIONS`.
        selection: "score" ranks by h, "abs_act" by |φ(h)|.
        dropout: Rate at which kept activations are dropped.
        chunk_size: Tokens scored at once; smaller if their scores exceed `SCORE_BUDGET`. None applies the budget only.
            Changes memory, never the result.

    Returns:
        One vector per token.

    Raises:
        ConfigError: If `k`, `activation`, `selection`, `dropout` or `chunk_size` is invalid.

    Example:
        >>> x, w_in, w_out = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> topk_feed_forward(x, w_in, w_out, k=4, activation="relu").shape
        torch.Size([2, 5, 8])
    """
    settings = feed_forward_settings(w_in.shape[0], k, activation, selection, PLAIN_SELECTIONS, dropout, chunk_size)
    return _feed_forward(x, Layer(w_in, None, w_out, b_in, None), b_out, settings)


def topk_gated_feed_forward(
    x: Float[Tensor, "*tokens hidden"],
    w_gate: Float[Tensor, "units hidden"],
    w_up: Float[Tensor, "units hidden"],
    w_out: Float[Tensor, "out units"],
    b_gate: Float[Tensor, " units"] | None = None,
    b_up: Float[Tensor, " units"] | None = None,
    b_out: Float[Tensor, " out"] | None = None,
    *,
    k: int | None,
    activation: str,
    selection: str = "product",
    dropout: float = 0.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*tokens out"]:
    """Compute y = Σ_{j∈T} φ(γ_j) u_j w_out[:, j] + b_out, with T the k highest-ranked units of each token.

    γ = w_gate x + b_gate and u = w_up x + b_up. The contribution of a unit depends on two dot products, so there is no
    single score to rank by: `product` drops the smallest contributions, `gate` saves the dense up-projection.

    Source: no counterpart in Gupta et al. 2021, whose layers are ungated; the rankings extend its section 2.

    Args:
        x: Token vectors, any leading axes.
        w_gate: Weights of the gate, one row per hidden unit.
        w_up: Weights of the up-projection, one row per hidden unit.
        w_out: Output weights, one column per hidden unit; its dtype may be wider than that of `x`.
        b_gate: Biases of the gate.
        b_up: Biases of the up-projection.
        b_out: Biases of the result.
        k: Units kept per token. None, or at least the number of units, gives the dense layer, which stores only `x` and
            recomputes activations in the backward pass.
        activation: Name in `ACTIVATIONS`.
        selection: Rank by "gate" γ, "abs_act" |φ(γ)| or "product" |φ(γ)·u|.
        dropout: Rate at which kept products are dropped.
        chunk_size: Tokens scored at once, as in `topk_feed_forward`.

    Returns:
        One vector per token.

    Raises:
        ConfigError: If `k`, `activation`, `selection`, `dropout` or `chunk_size` is invalid.

    Example:
        >>> x, w, w_out = torch.randn(5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> topk_gated_feed_forward(x, w, w, w_out, k=4, activation="silu").shape
        torch.Size([5, 8])
    """
    settings = feed_forward_settings(w_gate.shape[0], k, activation, selection, GATED_SELECTIONS, dropout, chunk_size)
    return _feed_forward(x, Layer(w_gate, w_up, w_out, b_gate, b_up), b_out, settings)


class _FeedForward(torch.autograd.Function):
    """Autograd node of one call; covers all its blocks."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, x: Tensor, *layer: Any) -> Tensor:
        with precise(x.device):
            output, kept = forward(x, Layer(*layer), settings, saves=True)
        ctx.settings = settings
        ctx.save_for_backward(x, *layer, *(kept or ()))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        layer, kept = Layer(*rest[:5]), Kept(*rest[5:]) if rest[5:] else None
        with torch.no_grad(), precise(x.device):
            found = backward(gradient, x, layer, kept, ctx.settings, Needs(*ctx.needs_input_grad[1:]))
        return (None, *forbid_double_backward(found))


def _feed_forward(x: Tensor, layer: Layer, b_out: Tensor | None, settings: Settings) -> Tensor:
    """Apply the layer to x [*tokens hidden], by custom operator, autograd node or plain forward pass."""
    refuse_trace("top-k feed-forward layers")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        parts: Any = (None if part is None else part.to(dtype) for part in layer)
        x, layer = x.to(dtype), Layer(*parts)
    tokens = x.reshape(-1, x.shape[-1])  # [*tokens, hidden] → [tokens, hidden]
    if tracing():
        output = custom_ops.feed_forward(tokens, layer, settings)
    else:
        seed = draw_seed(settings.dropout)
        settings = settings._replace(seed=0 if seed is None else int(seed))
        if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (tokens, *layer)):
            output = cast(
                Tensor,
                _FeedForward.apply(settings, tokens, *layer),  # pyright: ignore[reportUnknownMemberType]
            )
        else:
            with precise(x.device):
                output, _ = forward(tokens, layer, settings, saves=False)
    if b_out is not None:
        output = output + b_out.to(output.dtype)
    return output.reshape(*x.shape[:-1], output.shape[-1])  # [tokens, out] → [*tokens, out]


def feed_forward_settings(
    units: int,
    k: int | None,
    activation: str,
    selection: str,
    selections: tuple[str, ...],
    dropout: float,
    chunk_size: int | None,
) -> Settings:
    """Validate the arguments of one call.

    Args:
        units: Number of hidden units.
        k: Units kept per token; `units` and more becomes None (dense).
        activation: Name in `ACTIVATIONS`.
        selection: Ranking of the units.
        selections: `PLAIN_SELECTIONS` or `GATED_SELECTIONS`.
        dropout: Rate at which kept activations are dropped.
        chunk_size: Tokens scored at once.

    Returns:
        Settings with seed 0.

    Raises:
        ConfigError: If an argument is invalid.
    """
    select.check_k(k)
    select.check_chunk_size(chunk_size)
    select.check_dropout(dropout)
    find(activation)
    if selection not in selections:
        layer = "plain" if selections is PLAIN_SELECTIONS else "gated"
        raise ConfigError(
            f"selection is {selection!r} for a {layer} feed-forward layer. Expected one of: {', '.join(selections)}. "
            "Choose one of these."
        )
    kept = None if k is None or k >= units else k
    return Settings(kept, activation, selection, dropout, 0, chunk_size)
