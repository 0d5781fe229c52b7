"""Top-k attention: the public function and its autograd function."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.topk import custom_ops
from graftwork.methods.topk.activations import find
from graftwork.methods.topk.attention_passes import Backward, Kept, Needs, Settings, Shapes, forward
from graftwork.methods.topk.attention_scores import Rules
from graftwork.methods.topk.double_backward import forbid_double_backward
from graftwork.methods.topk.dropout import draw_seed, precise
from graftwork.methods.topk.selection import check_beside, check_chunk_size, check_dropout, check_k, check_softcap
from graftwork.surgery.masks import LazyMask, PositionBias, allowed_by
from graftwork.surgery.tracing import refuse_trace, tracing


def topk_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
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
) -> Float[Tensor, "batch heads queries value_width"]:
    """Attend to the k highest-scoring keys of every query: o_i = Σ_{j∈T_i} φ(z_i)_j v_j.

    z_ij = scale·q_i·k_j + b_ij, and T_i is the set of the k largest allowed z_ij. Scores outside T_i count as minus
    infinity, so a softmax φ normalises over k numbers, and the sink if there is one. The backward pass stores only
    these numbers and their positions, nothing per pair of query and key.

    Source: Gupta et al. 2021, section 2; `ag1988/top_k_attention`, `nocache_attention.py`.
    Differs from it: a query without any allowed key yields zeros, not an average; biases, caches and grouped keys;
    scores of half-precision inputs are computed in float32; sparse products; dropout masks are regenerated from a seed
    per call; keys masked for every query of a tile are never scored.

    Args:
        query: Queries, already rotated if the model uses rotary positions.
        key: Keys; consecutive heads share a group (grouped-query attention), which is never repeated in memory.
        value: Values, grouped like the keys.
        k: Keys kept per query. None, or at least the number of keys, gives dense attention that stores only its inputs
            and recomputes scores in the backward pass.
        scale: Factor on q·k, before the bias is added.
        mask: Lazy mask; or bool tensor, True where attention is allowed; or additive float tensor, in which any number
            up to `MASKED` (−5,000) forbids. Tensors broadcast to [batch heads queries keys].
        bias: Added to the scores before selection, broadcastable to [batch heads queries keys]. A `PositionBias` needs
            memory for one number per head and distance only.
        dropout: Rate at which kept weights are dropped.
        chunk_size: Queries scored at once; smaller if their scores exceed `TILE_BUDGET`. None applies the budget only.
            Changes memory, never the result.
        activation: "softmax", or a name in `ACTIVATIONS`.
        softcap: Bound c: scores become c·tanh(scale·q·k / c) before the bias is added (Gemma 2). None for no bound.
        sinks: Score per head of a further key without a value, which only takes weight (gpt-oss); softmax only.
        first: Keys from the first real one on that are kept beside the k best, if allowed.
        recent: Keys up to the query's own position that are kept beside the k best, if allowed.

    Returns:
        One combination of values per query.

    Raises:
        ConfigError: If an argument is invalid, or the mask was made for other sizes.

    Example:
        >>> q, k, v = torch.randn(2, 4, 16, 32), torch.randn(2, 2, 16, 32), torch.randn(2, 2, 16, 32)
        >>> topk_attention(q, k, v, k=8, scale=0.125).shape
        torch.Size([2, 4, 16, 32])
    """
    settings = attention_settings(
        key.shape[2], k, scale, activation, dropout, chunk_size, softcap=softcap, first=first, recent=recent
    )
    check_sinks(sinks, activation)
    refuse_trace("top-k attention")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rules = attention_rules(query, key, mask, bias, sinks, first)
    if tracing():
        return custom_ops.attention(query, key, value, rules, settings)
    seed = draw_seed(dropout)
    settings = settings._replace(seed=0 if seed is None else int(seed))
    inputs = (query, key, value, rules.bias, rules.relative, sinks)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs):
        return cast(Tensor, _Attention.apply(settings, rules, *inputs))  # pyright: ignore[reportUnknownMemberType]
    with precise(query.device):
        return forward(query, key, value, rules, settings, saves=False)[0]


class _Attention(torch.autograd.Function):
    """Autograd node of one call; covers all its tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        rules: Rules,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        relative: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        rules = rules._replace(bias=bias, relative=relative, sinks=sinks)
        with precise(query.device):
            output, kept = forward(query, key, value, rules, settings, saves=True)
        ctx.settings = settings
        ctx.shapes = Shapes.of(rules)
        # masks and biases only decide which scores are kept; without k the backward pass recomputes the scores
        again = (rules.allowed, bias, relative, sinks) if settings.k is None else (None, None, None, None)
        ctx.mask = rules.mask if settings.k is None else None
        ctx.save_for_backward(query, key, value, *again, *(kept or ()))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, allowed, bias, relative, sinks, *kept = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[2:])
        with torch.no_grad(), precise(query.device):
            passes = Backward(query, key, value, ctx.shapes, ctx.settings, needs)
            rules = Rules(ctx.mask, allowed, bias, relative, sinks)
            found = passes.run(gradient, rules, Kept(*kept) if kept else None)
        return (None, None, *forbid_double_backward(found))


def attention_settings(
    keys: int,
    k: int | None,
    scale: float,
    activation: str,
    dropout: float,
    chunk_size: int | None,
    *,
    softcap: float | None = None,
    first: int = 0,
    recent: int = 0,
) -> Settings:
    """Validate the arguments of one call.

    Args:
        keys: Number of keys.
        k: Keys kept per query; `keys` and more becomes None (dense).
        scale: Factor on q·k.
        activation: "softmax", or a name in `ACTIVATIONS`.
        dropout: Rate at which kept weights are dropped.
        chunk_size: Queries scored at once.
        softcap: Bound of the scores.
        first: First keys that are kept beside the k best.
        recent: Recent keys that are kept beside the k best.

    Returns:
        Settings with seed 0.

    Raises:
        ConfigError: If an argument is invalid.
    """
    check_k(k)
    check_chunk_size(chunk_size)
    check_dropout(dropout)
    check_softcap(softcap)
    check_beside(first, recent)
    if activation != "softmax":
        find(activation, softmax=True)
    kept = None if k is None or k >= keys else k
    return Settings(kept, scale, activation, dropout, 0, chunk_size, softcap, first, recent)


def check_sinks(sinks: Float[Tensor, " heads"] | None, activation: str) -> None:
    """Check that sinks are used with softmax only.

    Raises:
        ConfigError: If they are not.
    """
    if sinks is not None and activation != "softmax":
        raise ConfigError(f"activation is {activation!r} with sinks, which only take weight from a softmax. Omit them.")


def attention_rules(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    mask: LazyMask | Shaped[Tensor, ...] | None,
    bias: PositionBias | Float[Tensor, ...] | None,
    sinks: Float[Tensor, " heads"] | None = None,
    first: int = 0,
) -> Rules:
    """Convert masks and biases into `Rules`: lazy mask, boolean mask, additive bias, relative bias.

    Args:
        query: Queries.
        key: Keys.
        mask: See `topk_attention`.
        bias: See `topk_attention`.
        sinks: See `topk_attention`.
        first: See `topk_attention`.

    Raises:
        ConfigError: If a lazy mask was made for other sizes.
    """
    lazy = mask if isinstance(mask, LazyMask) else None
    allowed = added = relative = None
    if lazy is not None and (lazy.queries, lazy.keys) != (query.shape[2], key.shape[2]):
        raise ConfigError(
            f"mask is for {lazy.queries} queries and {lazy.keys} keys; query and key have {query.shape[2]} and "
            f"{key.shape[2]}. Build the mask for these."
        )
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            allowed = _four_axes(mask)
        else:
            added = _four_axes(mask)
    if isinstance(bias, PositionBias):
        relative = bias.relative
    elif bias is not None:
        # masked entries become minus infinity before the sum: a finite lowest number does not survive a dtype promotion
        bias = _four_axes(bias)
        added = bias if added is None else bias + added.masked_fill(~allowed_by(added), -torch.inf)
    shift = key.shape[2] - query.shape[2] if lazy is None else lazy.query_offset - lazy.key_offset
    return Rules(lazy, allowed, added, relative, sinks, _starts(query, key, mask) if first else None, shift)


def _starts(query: Tensor, key: Tensor, mask: LazyMask | Tensor | None) -> Int[Tensor, " batch"]:
    """First real key of each row: of a tensor, the first key that the last query may attend to."""
    if isinstance(mask, LazyMask):
        return mask.starts().to(query.device) - mask.key_offset
    if mask is None:
        return torch.zeros(query.shape[0], dtype=torch.long, device=query.device)
    last = _four_axes(allowed_by(mask))[:, 0, -1]  # [batch or 1, keys]
    return last.expand(query.shape[0], key.shape[2]).int().argmax(-1)


def _four_axes(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))  # […, keys] → [1, …, keys], four axes
