"""FlexAttention along a graph: 1.5-entmax as a softmax of scores, given the maximum and threshold of every row."""

from __future__ import annotations

import math
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
WORD = 62
"""Number of buckets in one integer of the mask function."""


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
    tile = math.lcm(TILE, graph.unit)
    # lengths are padded to whole tiles: partially masked tiles produced NaN
    padded = [torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % tile)) for x in (query, key, value)]
    extra = -queries % tile
    empty = torch.nn.functional.pad(_empty_rows(graph, query.device), (0, extra), value=True)  # [batch heads padded]
    top: Tensor | None = None
    threshold: Tensor | None = None
    if rows is not None:
        top, threshold = (torch.nn.functional.pad(x, (0, extra)).masked_fill(empty, 0.0) for x in rows)
    edge = pair_function(graph, query.device)

    def score(scores: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if top is None or threshold is None:
            return scores
        rest = scores - top[batch, head, row] - threshold[batch, head, row]
        return torch.where(rest > 0, 2 * torch.log(rest.clamp_min(torch.finfo(torch.float32).tiny)), -torch.inf)

    def permitted(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # the softmax of a row without a key is NaN: such a row gets one key here and is zeroed below
        inside = (row < queries) & (column < keys)
        found = inside & edge(batch, head, row.clamp_max(queries - 1), column.clamp_max(keys - 1))
        return found | (empty[batch, head, row] & (column == 0))

    output = _kernel(compiled)(
        *padded,
        score_mod=score,
        block_mask=block_mask_of(graph.coarse(tile, query.device), empty, permitted, tile),
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    output = output.masked_fill(empty[..., None], 0.0)  # [batch heads padded_queries 1]
    return output[:, :, :queries].nan_to_num(0.0)


def pair_function(graph: Graph, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Function of (batch, head, query, key) that is True for connected pairs, from the parts of the graph.

    It reads buckets, edges, pattern and mask at single positions, so no tensor of queries × keys is built.
    """
    mask, heads = graph.mask, graph.heads
    words = _bucket_words(graph)
    edges = None if graph.edges is None else graph.edges.expand(mask.batch, heads, -1, -1)
    starts = graph.starts().to(device)
    last_query, last_key = (ends.to(device) - 1 for ends in graph.lengths)
    key_unit = graph.key_unit or graph.unit

    def connected(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        found = torch.zeros((), dtype=torch.bool, device=device)
        for query_word, key_word in words:
            shared = query_word[batch, head, row // graph.unit] & key_word[batch, head, column // graph.unit]
            found = found | (shared != 0)
        if edges is not None:
            found = found | edges[batch, head, row // graph.unit, column // key_unit]
        query, key = row + mask.query_offset, column + mask.key_offset
        if graph.pattern:
            places = [
                (place - starts[batch]) // graph.unit for place in (query, key, last_query[batch], last_key[batch])
            ]
            found = found | graph.pattern.edges(*places)
        if mask.causal:
            found = found & (key <= query)
        if mask.padding is not None:
            found = found & mask.padding.to(device)[batch, column]
        if mask.predicate is not None:
            found = found & mask.predicate(batch, head, query, key)
        if graph.query_real is not None:
            found = found & graph.query_real[batch, row]
        return found

    return connected


def _bucket_words(graph: Graph) -> list[tuple[Tensor, Tensor]]:
    """Bucket flags of queries and keys as bits of integers, 62 buckets a word, each [batch heads units]."""
    if graph.query_buckets is None or graph.key_buckets is None:
        return []
    batch, heads = graph.mask.batch, graph.heads
    words: list[tuple[Tensor, Tensor]] = []
    for start in range(0, graph.query_buckets.shape[-1], WORD):
        both: list[Tensor] = []
        for flags in (graph.query_buckets, graph.key_buckets):
            own = flags[..., start : start + WORD].long()
            bits = torch.arange(own.shape[-1], device=own.device)
            both.append((own << bits).sum(-1).expand(batch, heads, -1))  # [batch heads units bits] → sum over bits
        words.append((both[0], both[1]))
    return words


def _empty_rows(graph: Graph, device: torch.device) -> Bool[Tensor, "batch heads queries"]:
    """True for queries without a connected key, some rows at a time."""
    step = math.lcm(TILE, graph.unit)
    parts = [
        ~graph.rows(start, min(start + step, graph.mask.queries), device).any(-1)
        for start in range(0, graph.mask.queries, step)
    ]
    return torch.cat(parts, 2)


def block_mask_of(
    tiles: Bool[Tensor, "batch heads rows columns"],
    empty: Bool[Tensor, "batch heads padded_queries"],
    permitted: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    tile: int,
) -> BlockMask:
    """Lists of the key tiles of every query tile, and the mask function inside the tiles.

    Args:
        tiles: Tiles that can contain a connected pair.
        empty: Queries without a connected key, which attend to key 0.
        permitted: Mask function.
        tile: Tokens per tile.
    """
    tiles = tiles.clone()
    tiles[..., 0] |= unflatten(empty, 2, (-1, tile)).any(-1)  # [batch heads rows tile] → any over tile
    counts = tiles.sum(-1, dtype=torch.int32)
    order = tiles.byte().sort(dim=-1, descending=True, stable=True).indices.int()
    return BlockMask.from_kv_blocks(
        counts,
        order,
        None,
        None,
        BLOCK_SIZE=tile,
        mask_mod=permitted,
        seq_lengths=(tiles.shape[2] * tile, tiles.shape[3] * tile),
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
