"""Top-k attention and feed-forward layers as the paper defines them: select, scatter, activate, multiply.

The reference implementation is differentiable by ordinary autograd, materialises every score and has no option that the
definition lacks. The tests compare the fast paths of `functional` with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda score: F.gelu(score, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "quick_gelu": lambda score: score * torch.sigmoid(1.702 * score),
    "identity": lambda score: score,
}
"""Elementwise φ of section 3; softmax is part of `attention`."""


def kept(score: Float[Tensor, "*rows keys"], k: int) -> Bool[Tensor, "*rows keys"]:
    """Return the mask of each row's k largest entries: the set T_i."""
    selected = score.topk(min(k, score.shape[-1]), dim=-1).indices  # [*rows, k]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, selected, True)


def attention(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch groups keys width"],
    v: Float[Tensor, "batch groups keys value_width"],
    *,
    topk: int,
    scale: float,
    allowed: Bool[Tensor, ...] | None = None,
    bias: Float[Tensor, ...] | None = None,
    activation: str = "softmax",
    dropout_factor: Float[Tensor, ...] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    always: Bool[Tensor, ...] | None = None,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Compute o_i = Σ_{j∈T_i} φ(z_i)_j v_j with z = scale·q·k + b and T_i the k largest allowed z_ij.

    Source: Gupta et al. 2021, section 2; `ag1988/top_k_attention`, `nocache_attention.py`.
    Differs: a query without any allowed key yields zeros, and a forbidden key weighs 0 under every φ.

    Args:
        q: Queries.
        k: Keys; `groups` divides `heads`, and consecutive query heads share one group (grouped-query attention).
        v: Values.
        topk: The k of the paper; clamped to the number of keys.
        scale: Factor on q·k, before the bias is added.
        allowed: True where attention is allowed, broadcastable to [batch heads queries keys].
        bias: Added to the scores before selection, broadcastable to [batch heads queries keys].
        activation: "softmax" or a key of `ACTIVATIONS`.
        dropout_factor: Factor on the weights, 0 or 1/(1−rate), [batch heads queries keys].
        softcap: Bound c of c·tanh(scale·q·k / c), which replaces scale·q·k.
        sinks: Score of a further key per head, whose value is zero; softmax only.
        always: True for keys that belong to T_i beside the k largest of the others, if allowed.

    Returns:
        One combination of values per query.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # [batch, heads, keys, …]
    z = scale * (q @ k.mT)  # [batch, heads, queries, keys]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if bias is not None:
        z = z + bias  # broadcast to [batch, heads, queries, keys]
    legal = torch.ones_like(z, dtype=torch.bool) if allowed is None else allowed.expand_as(z)
    held = legal & (torch.zeros_like(legal) if always is None else always)
    legal = held | (legal & ~held & kept(z.detach().masked_fill(~legal | held, -torch.inf), topk))
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*z.shape[:-1], 1)  # [batch, heads, queries, 1]
        weight = torch.softmax(torch.cat([z.masked_fill(~legal, -torch.inf), sink], dim=-1), dim=-1)[..., :-1]
    elif activation == "softmax":
        weight = torch.softmax(z.masked_fill(~legal, -torch.inf), dim=-1)
    else:
        weight = ACTIVATIONS[activation](z)
    # masked twice, so that the NaN of an empty softmax does not reach the gradient either
    weight = torch.where(legal, weight.masked_fill(~legal.any(-1, keepdim=True), 0.0), 0.0)
    return (weight if dropout_factor is None else weight * dropout_factor) @ v


def feed_forward(
    x: Float[Tensor, "tokens hidden"],
    w_in: Float[Tensor, "units hidden"],
    w_out: Float[Tensor, "out units"],
    b_in: Float[Tensor, " units"] | None = None,
    b_out: Float[Tensor, " out"] | None = None,
    *,
    k: int,
    activation: str,
    selection: str = "score",
) -> Float[Tensor, "tokens out"]:
    """Compute y = W₂ φ(W₁x + b₁) + b₂ over the k units of each token that rank highest.

    Source: Gupta et al. 2021, section 2 (a feed-forward layer is attention with fixed keys and values).

    Args:
        x: Token vectors: the queries.
        w_in: W₁: the keys.
        w_out: W₂: the values, one column each.
        b_in: b₁, part of the score.
        b_out: b₂.
        k: Units kept per token; clamped to the number of units.
        activation: A key of `ACTIVATIONS`.
        selection: Ranking of the units: "score" h or "abs_act" |φ(h)|.

    Returns:
        One vector per token.
    """
    h = F.linear(x, w_in, b_in)  # [tokens, units]
    a = ACTIVATIONS[activation](h)  # [tokens, units]
    rank = {"score": h, "abs_act": a.abs()}[selection]
    return F.linear(a * kept(rank.detach(), k), w_out, b_out)


def gated_feed_forward(
    x: Float[Tensor, "tokens hidden"],
    w_gate: Float[Tensor, "units hidden"],
    w_up: Float[Tensor, "units hidden"],
    w_out: Float[Tensor, "out units"],
    *,
    k: int,
    activation: str,
    selection: str = "product",
) -> Float[Tensor, "tokens out"]:
    """Compute y = W_d (φ(W_g x) ⊙ W_u x) over the k units of each token that rank highest.

    Source: Shazeer 2020 for the layer; the paper has no gated layer, so the three rules extend its section 2.

    Args:
        x: Token vectors.
        w_gate: W_g, of the gate γ = W_g x, to which φ is applied.
        w_up: W_u, of the factor u = W_u x, which stays linear.
        w_out: W_d.
        k: Units kept per token; clamped to the number of units.
        activation: A key of `ACTIVATIONS`.
        selection: Ranking of the units: "gate" γ, "abs_act" |φ(γ)| or "product" |φ(γ)·u|.

    Returns:
        One vector per token.
    """
    gate, up = F.linear(x, w_gate), F.linear(x, w_up)  # [tokens, units] each
    a = ACTIVATIONS[activation](gate)
    rank = {"gate": gate, "abs_act": a.abs(), "product": (a * up).abs()}[selection]
    return F.linear(a * up * kept(rank.detach(), k), w_out)
