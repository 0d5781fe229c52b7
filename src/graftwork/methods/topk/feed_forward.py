"""Top-k feed-forward layers, plain and gated, as differentiable functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.topk import custom_ops
from graftwork.methods.topk import selection as select
from graftwork.methods.topk.activations import find
from graftwork.methods.topk.dropout import draw_seed, precise
from graftwork.methods.topk.feed_forward_passes import Kept, Layer, Needs, Settings, backward, forward
from graftwork.methods.topk.double_backward import forbid_double_backward

PLAIN_SELECTIONS = ("score", "abs_act")
GATED_SELECTIONS = ("gate", "abs_act", "product")


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
    """Feed tokens through the k hidden units that score highest for each.

    A feed-forward layer is attention with learned keys (`w_in`) and values (`w_out`). Only the input and the k kept
    scores with their positions are stored for the backward pass, and only the kept rows of the weights are read there.

    Source: Gupta et al. 2021, section 2; `ag1988/top_k_attention`, `nocache_attention.py` and `unifiedqa/`.
    Differs from it: biases, any activation, sparse products, chunks that never exceed their size, dropout whose mask
    belongs to the call, no gradient that nobody asked for.

    Args:
        x: Token vectors, any leading axes.
        w_in: Weights into the hidden units, a row each.
        w_out: Weights out of them, a column each; may be wider than `x`, as in T5, and then so is the result.
        b_in: Biases of the hidden units; part of what they are ranked by.
        b_out: Biases of the result.
        k: Units kept per token. None, or the width and more, keeps all, stores `x` alone and recomputes.
        activation: Name in `ACTIVATIONS`.
        selection: "score" ranks by pre-activation, "abs_act" by magnitude after the activation.
        dropout: Rate at which kept activations are dropped.
        chunk_size: Tokens scored at once; blocks are smaller where wide layers ask for it, and None leaves only that
            rule (`SCORE_BUDGET` scores, at least one token). Changes memory, never the result.

    Returns:
        One vector per token.

    Raises:
        ConfigError: If `k`, `activation`, `selection`, `dropout` or `chunk_size` has a value that it cannot have.

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
    """Feed tokens through the k gated hidden units that matter most for each.

    A unit contributes activation(gate) × up, the product of two dot products, so no single key reproduces it and the
    rule of selection is a choice: `product` drops the least magnitude, `gate` spares the dense up-projection.

    Source: no counterpart in Gupta et al. 2021, whose layers are ungated; the rules extend its section 2.

    Args:
        x: Token vectors, any leading axes.
        w_gate: Weights into the gate, a row per hidden unit.
        w_up: Weights into the factor of the gate, likewise.
        w_out: Weights out of the hidden units, a column each; may be wider than `x`.
        b_gate: Biases of the gate.
        b_up: Biases of its factor.
        b_out: Biases of the result.
        k: Units kept per token. None, or the width and more, keeps all, stores `x` alone and recomputes.
        activation: Name in `ACTIVATIONS`.
        selection: Rank by "gate" before its activation, "abs_act" |activation(gate)|, or "product" of that and up.
        dropout: Rate at which kept products are dropped.
        chunk_size: Tokens scored at once, as in `topk_feed_forward`.

    Returns:
        One vector per token.

    Raises:
        ConfigError: If `k`, `activation`, `selection`, `dropout` or `chunk_size` has a value that it cannot have.

    Example:
        >>> x, w, w_out = torch.randn(5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> topk_gated_feed_forward(x, w, w, w_out, k=4, activation="silu").shape
        torch.Size([5, 8])
    """
    settings = feed_forward_settings(w_gate.shape[0], k, activation, selection, GATED_SELECTIONS, dropout, chunk_size)
    return _feed_forward(x, Layer(w_gate, w_up, w_out, b_gate, b_up), b_out, settings)


class _FeedForward(torch.autograd.Function):
    """One graph node for all blocks of one call."""

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
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        parts: Any = (None if part is None else part.to(dtype) for part in layer)
        x, layer = x.to(dtype), Layer(*parts)
    tokens = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        output = custom_ops.feed_forward(tokens, layer, settings)
    else:
        seed = draw_seed(settings.dropout)
        settings = settings._replace(seed=0 if seed is None else int(seed))
        if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (tokens, *layer)):
            output = _FeedForward.apply(settings, tokens, *layer)
        else:
            with precise(x.device):
                output, _ = forward(tokens, layer, settings, saves=False)
    if b_out is not None:
        output = output + b_out.to(output.dtype)
    return output.reshape(*x.shape[:-1], output.shape[-1])


def feed_forward_settings(
    units: int,
    k: int | None,
    activation: str,
    selection: str,
    selections: tuple[str, ...],
    dropout: float,
    chunk_size: int | None,
) -> Settings:
    """Check the settings of one call; to keep all units is to keep none in particular.

    Raises:
        ConfigError: If a setting has a value that it cannot have.
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
