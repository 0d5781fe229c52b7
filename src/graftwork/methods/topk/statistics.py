"""Statistics of top-k layers for reports: the share of the dense layer's weights or activations that is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftwork.methods.topk.attention import attention_rules, attention_settings, check_sinks
from graftwork.methods.topk.attention_passes import activated, activated_with_sinks, select
from graftwork.methods.topk.attention_scores import Scores
from graftwork.methods.topk.dropout import precise
from graftwork.methods.topk.feed_forward import GATED_SELECTIONS, PLAIN_SELECTIONS, feed_forward_settings
from graftwork.methods.topk.feed_forward_passes import Layer, Settings, hidden_units, select_units
from graftwork.methods.topk.selection import row_blocks
from graftwork.surgery.masks import LazyMask, PositionBias


@dataclass(frozen=True, slots=True, eq=False)
class AttentionStatistics:
    """Selection of top-k attention, and its share of dense attention."""

    indices: Int[Tensor, "batch heads queries kept"]
    """Positions of the kept keys, int32; padded with −1 if fewer than k keys are allowed."""
    weights: Float[Tensor, "batch heads queries kept"]
    """Weight of each kept key, in at least float32."""
    log_normaliser: Float[Tensor, "batch heads queries"]
    """Log-sum-exp of the kept scores; minus infinity for a query without any allowed key."""
    kept_mass: Float[Tensor, " heads"]
    """Share of the dense weights, in magnitude, on the kept keys; mean over queries with a non-zero weight."""


@dataclass(frozen=True, slots=True, eq=False)
class FeedForwardStatistics:
    """Share of a dense feed-forward layer's activation in its k highest-ranked units."""

    kept_mass: Float[Tensor, ""]
    """Share of Σ|a| in the kept units, over all tokens together."""
    active_units: Float[Tensor, ""]
    """Number of hidden units that are not exactly zero in the dense layer, mean over tokens."""


@torch.no_grad()
def topk_attention_statistics(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"] | None = None,
    *,
    k: int | None,
    scale: float,
    mask: LazyMask | Bool[Tensor, ...] | Float[Tensor, ...] | None = None,
    bias: PositionBias | Float[Tensor, ...] | None = None,
    dropout: float = 0.0,
    chunk_size: int | None = 1024,
    activation: str = "softmax",
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    first: int = 0,
    recent: int = 0,
) -> AttentionStatistics:
    """Compute the statistics of `topk_attention` for the same arguments.

    The kept mass of a query is Σ_{j∈T} |w_j| / Σ_j |w_j| with dense weights w; for softmax, exp(lse_T(z) − lse(z)).

    Source: the diagnostic 1 − Σ p over the kept keys for the softmax case; no counterpart in the authors' code.

    Args:
        query: Queries.
        key: Keys.
        value: Ignored; accepted so that the arguments of a `topk_attention` call can be passed unchanged.
        k: Keys kept per query; None keeps all.
        scale: Factor on q·k.
        mask: As in `topk_attention`.
        bias: As in `topk_attention`.
        dropout: Ignored; accepted for the same reason as `value`.
        chunk_size: Queries scored at once.
        activation: "softmax", or a name in `ACTIVATIONS`.
        softcap: As in `topk_attention`.
        sinks: As in `topk_attention`; the kept mass is the share of the weight on keys, without the sink.
        first: As in `topk_attention`.
        recent: As in `topk_attention`.

    Returns:
        Positions, weights and kept mass. Positions and weights need as much memory as top-k attention saves for its
        backward pass.

    Raises:
        ConfigError: If an argument is invalid.

    Example:
        >>> q = torch.randn(1, 2, 8, 4)
        >>> topk_attention_statistics(q, q, k=8, scale=0.5).kept_mass
        tensor([1., 1.])
    """
    settings = attention_settings(
        key.shape[2], k, scale, activation, 0.0, chunk_size, softcap=softcap, first=first, recent=recent
    )
    check_sinks(sinks, activation)
    rules = attention_rules(query, key, mask, bias, sinks, first)
    scores_of = Scores(query, key, rules, scale, softcap)
    sizes, softmax = scores_of.sizes, activation == "softmax"
    shape = (*query.shape[:-1], settings.entries(sizes.keys) or sizes.keys)
    indices = query.new_full(shape, -1, dtype=torch.int32)
    weights = query.new_zeros(shape, dtype=scores_of.dtype)
    normaliser = query.new_zeros(shape[:-1], dtype=scores_of.dtype)
    mass, counted = (query.new_zeros(sizes.heads, dtype=torch.float64) for _ in range(2))
    for tile in scores_of.tiles(chunk_size):
        with precise(query.device):
            scores = scores_of.of(tile, scores_of.visible(tile))
        selected, index = select(scores_of, scores, tile, settings)  # [batch, heads, rows, kept]
        if index is None:
            index = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        tile.of_queries(indices)[..., : index.shape[-1]] = index.int().masked_fill_(selected == -torch.inf, -1)
        kept_weights, _ = activated_with_sinks(selected, activation, True, sinks, tile)
        tile.of_queries(weights)[..., : index.shape[-1]] = kept_weights
        kept_sum = torch.logsumexp(selected, dim=-1)  # [batch, heads, rows]
        tile.of_queries(normaliser).copy_(kept_sum)
        if softmax:
            share = (kept_sum - torch.logsumexp(scores, dim=-1)).exp()
            any_mass = kept_sum > -torch.inf
        else:
            whole = activated(scores, activation, forbid=True).abs_().sum(-1)
            share, any_mass = activated(selected, activation, forbid=True).abs_().sum(-1) / whole, whole > 0
        mass[tile.heads] += share.double().where(any_mass, 0.0).sum((0, 2))  # [batch, heads, rows] → [heads]
        counted[tile.heads] += any_mass.sum((0, 2))
    # a head without any non-zero weight has a kept mass of 1
    kept_mass = torch.where(counted > 0, mass / counted.clamp(min=1.0), 1.0)
    return AttentionStatistics(indices, weights, normaliser, kept_mass.to(scores_of.dtype))


def topk_feed_forward_statistics(
    x: Float[Tensor, "*tokens hidden"],
    w_in: Float[Tensor, "units hidden"],
    b_in: Float[Tensor, " units"] | None = None,
    *,
    k: int | None,
    activation: str,
    selection: str = "score",
    chunk_size: int | None = None,
) -> FeedForwardStatistics:
    """Compute the share of the hidden activations |φ(h)| that `topk_feed_forward` keeps.

    Source: no counterpart in the authors' code; the activation sparsity is that of Li et al. 2022, "Large models are
    parsimonious learners" (arXiv 2210.06313).

    Args:
        x: Token vectors, any leading axes.
        w_in: Input weights, one row per hidden unit.
        b_in: Biases of the hidden units.
        k: Units kept per token; None keeps all.
        activation: Name in `ACTIVATIONS`.
        selection: "score" or "abs_act".
        chunk_size: Tokens scored at once.

    Returns:
        Kept mass and active units.

    Raises:
        ConfigError: If an argument is invalid.

    Example:
        >>> topk_feed_forward_statistics(torch.randn(5, 8), torch.randn(32, 8), k=32, activation="relu").kept_mass
        tensor(1.)
    """
    settings = feed_forward_settings(w_in.shape[0], k, activation, selection, PLAIN_SELECTIONS, 0.0, chunk_size)
    return _feed_forward_statistics(x, Layer(w_in, None, w_in.t(), b_in, None), settings)


def topk_gated_feed_forward_statistics(
    x: Float[Tensor, "*tokens hidden"],
    w_gate: Float[Tensor, "units hidden"],
    w_up: Float[Tensor, "units hidden"],
    b_gate: Float[Tensor, " units"] | None = None,
    b_up: Float[Tensor, " units"] | None = None,
    *,
    k: int | None,
    activation: str,
    selection: str = "product",
    chunk_size: int | None = None,
) -> FeedForwardStatistics:
    """Compute the share of the products |φ(γ)·u| that `topk_gated_feed_forward` keeps.

    Source: as `topk_feed_forward_statistics`.

    Args:
        x: Token vectors, any leading axes.
        w_gate: Weights of the gate, one row per hidden unit.
        w_up: Weights of the up-projection, one row per hidden unit.
        b_gate: Biases of the gate.
        b_up: Biases of the up-projection.
        k: Units kept per token; None keeps all.
        activation: Name in `ACTIVATIONS`.
        selection: "gate", "abs_act" or "product".
        chunk_size: Tokens scored at once.

    Returns:
        Kept mass and active units.

    Raises:
        ConfigError: If an argument is invalid.

    Example:
        >>> w = torch.randn(32, 8)
        >>> topk_gated_feed_forward_statistics(torch.randn(5, 8), w, w, k=32, activation="silu").kept_mass
        tensor(1.)
    """
    settings = feed_forward_settings(w_gate.shape[0], k, activation, selection, GATED_SELECTIONS, 0.0, chunk_size)
    return _feed_forward_statistics(x, Layer(w_gate, w_up, w_gate.t(), b_gate, b_up), settings)


@torch.no_grad()
def _feed_forward_statistics(x: Tensor, layer: Layer, settings: Settings) -> FeedForwardStatistics:
    """Statistics of x [*tokens hidden], block by block."""
    tokens = x.reshape(-1, x.shape[-1]).to(layer.gate.dtype)  # [*tokens, hidden] → [tokens, hidden]
    kept, whole, active = (tokens.new_zeros((), dtype=torch.float64) for _ in range(3))
    with precise(x.device):
        for start, stop in row_blocks(tokens.shape[0], layer.gate.shape[0], settings.chunk_size):
            rows = tokens[start:stop]
            gate, up, _, _ = select_units(rows, layer, settings._replace(k=None))
            dense = hidden_units(gate, up, settings.activation)
            active += dense.count_nonzero()
            whole += dense.abs_().sum(dtype=torch.float64)
            if settings.k is not None:
                gate, up, _, _ = select_units(rows, layer, settings)
                kept += hidden_units(gate, up, settings.activation).abs_().sum(dtype=torch.float64)
    share = kept / whole if settings.k is not None and whole > 0 else torch.ones_like(kept)
    return FeedForwardStatistics(share.float(), (active / max(1, tokens.shape[0])).float())
