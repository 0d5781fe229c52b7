"""Top-k attention as a differentiable function of tensors."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.topk import custom_ops
from graftwork.methods.topk.activations import find
from graftwork.methods.topk.attention_passes import Backward, Kept, Needs, Settings, Shapes, forward
from graftwork.methods.topk.attention_scores import Rules
from graftwork.methods.topk.dropout import draw_seed, precise
from graftwork.methods.topk.double_backward import forbid_double_backward
from graftwork.methods.topk.selection import check_chunk_size, check_dropout, check_k
from graftwork.surgery.masks import LazyMask, PositionBias


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
) -> Float[Tensor, "batch heads queries value_width"]:
    """Attend to the k highest-scoring keys of every query.

    Scores outside the k largest count as minus infinity, so the softmax runs over k numbers. Only those and their
    positions are kept for the backward pass, never a number or a mask bit per query and key.

    Source: Gupta et al. 2021, section 2; `ag1988/top_k_attention`, `nocache_attention.py`.
    Differs from it: a query without any allowed key yields zeros, not an average; biases, caches and grouped keys;
    half precision scores in single precision; sparse products; dropout whose mask belongs to the call; keys that no
    query of a chunk can see are never scored.

    Args:
        query: Queries, already rotated if the model uses rotary positions.
        key: Keys; each group of consecutive heads shares one, which is never repeated in memory.
        value: Values, likewise.
        k: Keys kept per query. None, or the number of keys and more, attends to all, stores the inputs alone and
            recomputes.
        scale: Factor on q·k, before the bias is added.
        mask: Which keys are allowed: a lazy mask, a bool tensor that is True where allowed, or a float tensor to add
            whose lowest number or minus infinity forbids. Tensors broadcast to batch × heads × queries × keys.
        bias: Added to the scores before selection. A dense tensor costs what it costs; a `PositionBias` costs a number
            per head and distance, and its table receives its gradient through that.
        dropout: Rate at which kept weights are dropped.
        chunk_size: Queries scored at once; tiles are smaller where many heads and keys ask for it, and None leaves only
            that rule (`TILE_BUDGET` scores, at least one query). Changes memory, never the result.
        activation: "softmax", or a name in `ACTIVATIONS`.

    Returns:
        One combination of values per query.

    Raises:
        ConfigError: If `k`, `activation`, `dropout` or `chunk_size` has a value that it cannot have.

    Example:
        >>> q, k, v = torch.randn(2, 4, 16, 32), torch.randn(2, 2, 16, 32), torch.randn(2, 2, 16, 32)
        >>> topk_attention(q, k, v, k=8, scale=0.125).shape
        torch.Size([2, 4, 16, 32])
    """
    settings = attention_settings(key.shape[2], k, scale, activation, dropout, chunk_size)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rules = attention_rules(query, key, mask, bias)
    if torch.compiler.is_compiling():
        return custom_ops.attention(query, key, value, rules, settings)
    seed = draw_seed(dropout)
    settings = settings._replace(seed=0 if seed is None else int(seed))
    inputs = (query, key, value, rules.bias, rules.relative)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs):
        return _Attention.apply(settings, rules, *inputs)
    with precise(query.device):
        return forward(query, key, value, rules, settings, saves=False)[0]


class _Attention(torch.autograd.Function):
    """One graph node for all tiles of one call."""

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
    ) -> Tensor:
        rules = rules._replace(bias=bias, relative=relative)
        with precise(query.device):
            output, kept = forward(query, key, value, rules, settings, saves=True)
        ctx.settings = settings
        ctx.shapes = Shapes.of(rules)
        # masks and biases decide which scores are kept, and are not needed once they are
        again = (rules.allowed, bias, relative) if settings.k is None else (None, None, None)
        ctx.mask = rules.mask if settings.k is None else None
        ctx.save_for_backward(query, key, value, *again, *(kept or ()))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, allowed, bias, relative, *kept = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[2:])
        with torch.no_grad(), precise(query.device):
            passes = Backward(query, key, value, ctx.shapes, ctx.settings, needs)
            found = passes.run(gradient, Rules(ctx.mask, allowed, bias, relative), Kept(*kept) if kept else None)
        return (None, None, *forbid_double_backward(found))


def attention_settings(
    keys: int, k: int | None, scale: float, activation: str, dropout: float, chunk_size: int | None
) -> Settings:
    """Check the settings of one call; to keep all keys is to keep none in particular.

    Raises:
        ConfigError: If `k`, `activation`, `dropout` or `chunk_size` has a value that it cannot have.
    """
    check_k(k)
    check_chunk_size(chunk_size)
    check_dropout(dropout)
    if activation != "softmax":
        find(activation, softmax=True)
    return Settings(None if k is None or k >= keys else k, scale, activation, dropout, 0, chunk_size)


def attention_rules(
    query: Tensor, key: Tensor, mask: LazyMask | Tensor | None, bias: PositionBias | Tensor | None
) -> Rules:
    """Sort masks and biases by how they act on scores.

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
        relative = _relative(bias, query.shape[2], key.shape[2])
    elif bias is not None:
        # two dense additions are the caller's own size; minus infinity survives a change of type, a lowest number not
        bias = _four_axes(bias)
        added = (
            bias if added is None else bias + added.masked_fill(added <= torch.finfo(added.dtype).min / 2, -torch.inf)
        )
    return Rules(lazy, allowed, added, relative)


def _relative(bias: PositionBias, queries: int, keys: int) -> Float[Tensor, "heads distances"] | None:
    """The bias of every distance that occurs, key position − query position ascending."""
    if bias.table is None or bias.bucket_of is None:
        return None
    distance = torch.arange(queries + keys - 1, device=bias.table.device) - (queries - 1 + bias.query_offset)
    return bias.table[bias.bucket_of(distance)].t()


def _four_axes(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
