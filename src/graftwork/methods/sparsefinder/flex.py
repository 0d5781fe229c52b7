"""FlexAttention along a graph: 1.5-entmax as a softmax of scores, given the maximum and threshold of every row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.gathering import gathered_threshold
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.methods.sparsefinder.tensors import unflatten
from graftwork.surgery.precision import compute_dtype

TILE = 128
"""Tokens per tile of the block lists; lengths are padded to a multiple of it."""


def flex_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    graph: Graph,
    *,
    scale: float,
    alpha: float | Tensor,
    size: int,
    compiled: bool | None = None,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Compute masked entmax with FlexAttention; forward pass only.

    With the maximum m and the threshold t of a row, the scores s become 2 · log(s − m − t), and

        softmax(2 · log(s − m − t)) = (s − m − t)₊² / Σ (s − m − t)₊² = ((s − m − t)₊ / 2)²

    Source: section 8.3 of the specification. The gradient with t held constant is wrong, so gradients are refused.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        graph: Connected pairs.
        scale: Factor on query·key.
        alpha: 1.5, or 1 for softmax; a scalar.
        size: Tokens per block of the pass that computes m and t.
        compiled: Compile the kernel; None compiles on accelerators only. An uncompiled kernel ignores the block lists
            and applies the mask function only, so it skips no work; it runs in float32, because it would round the
            scores of half precision.

    Raises:
        ConfigError: If α is neither 1 nor 1.5, or an input requires a gradient.
    """
    if isinstance(alpha, Tensor) or alpha not in (1.0, 1.5):
        raise ConfigError(f"alpha is {alpha}. Expected 1.5 or 1 for executor flex; use blocks for any other.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ConfigError("executor flex has no gradient. Train with executor blocks, or run under torch.no_grad().")
    if compiled is None:
        compiled = query.device.type != "cpu"
    queries, keys = query.shape[2], key.shape[2]
    if not compiled and value.dtype != compute_dtype(value.dtype):
        # the mean key changes all scores of a query by the same number
        query, key, wide = (x.float() for x in (query, key, value))
        key = key - key.mean(2, keepdim=True)
        output = flex_attention(query, key, wide, graph, scale=scale, alpha=alpha, size=size, compiled=False)
        return output.to(value.dtype)
    rows = gathered_threshold(query, key, graph, scale=scale, size=size) if alpha == 1.5 else None
    # lengths are padded to whole tiles: partially masked tiles produced NaN
    padded = [torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % TILE)) for x in (query, key, value)]
    allowed = torch.nn.functional.pad(graph.dense(query.device), (0, -keys % TILE, 0, -queries % TILE))
    empty = ~allowed.any(-1)  # [batch heads padded_queries]
    allowed_or_first = allowed.clone()
    # the softmax of a row without a key is NaN: such a row gets one key here and is zeroed below
    allowed_or_first[..., 0] |= empty
    top: Tensor | None = None
    threshold: Tensor | None = None
    if rows is not None:
        top, threshold = (torch.nn.functional.pad(x, (0, -queries % TILE)).masked_fill(empty, 0.0) for x in rows)

    def score(scores: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if top is None or threshold is None:
            return scores
        rest = scores - top[batch, head, row] - threshold[batch, head, row]
        return torch.where(rest > 0, 2 * torch.log(rest.clamp_min(torch.finfo(torch.float32).tiny)), -torch.inf)

    def permitted(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return allowed_or_first[batch, head, row, column]

    output = _kernel(compiled)(
        *padded,
        score_mod=score,
        block_mask=_block_mask(allowed_or_first, permitted),
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    output = output.masked_fill(empty[..., None], 0.0)  # [batch heads padded_queries 1]
    return output[:, :, :queries].nan_to_num(0.0)


def _block_mask(
    allowed: Bool[Tensor, "batch heads queries keys"], permitted: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> BlockMask:
    """Lists of the key tiles of every query tile, and the mask inside the tiles."""
    tiles = unflatten(unflatten(allowed, 3, (-1, TILE)), 2, (-1, TILE))  # [batch heads rows TILE columns TILE]
    tiles = tiles.any(3).any(-1)  # [batch heads rows columns]
    counts = tiles.sum(-1, dtype=torch.int32)
    order = tiles.byte().sort(dim=-1, descending=True, stable=True).indices.int()
    return BlockMask.from_kv_blocks(
        counts,
        order,
        None,
        None,
        BLOCK_SIZE=TILE,
        mask_mod=permitted,
        seq_lengths=(allowed.shape[2], allowed.shape[3]),
    )


@cache
def _kernel(compiled: bool) -> Callable[..., Tensor]:
    if compiled:
        kernel = torch.compile(torch_flex_attention, dynamic=False)  # pyright: ignore[reportUnknownMemberType]
        return cast("Callable[..., Tensor]", kernel)

    def uncompiled(*arguments: Any, **options: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return cast(Tensor, torch_flex_attention(*arguments, **options))

    return uncompiled
