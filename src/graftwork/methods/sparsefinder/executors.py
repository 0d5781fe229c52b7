"""Attention along a graph, computed three ways that agree: masked, by gathered key blocks, by FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.gathering import (
    _gathered_pairs,
    _gathered_positions,
    _is_whole,
    _padded,
    _row_groups,
    _Rows,
)
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.surgery.masks import PositionBias

BLOCKS_FROM = 1024
"""Keys from which `auto` gathers blocks; below, gathering does not pay reliably."""

Bias = PositionBias | Tensor | None


def sparse_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    graph: Graph,
    *,
    scale: float,
    alpha: float | Tensor = 1.5,
    executor: str = "auto",
    block_size: int = 64,
    exact: bool = True,
    bias: Bias = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Attend along a graph: α-entmax over the connected keys of every query, zero where there is none.

    Source: section 8.3 of the specification. Differs from the authors' layers: no key counts twice, and an empty row
    gives zeros instead of turning dense.

    Args:
        query: Queries.
        key: Keys; a divisor of the heads shares each among several query heads.
        value: Values.
        graph: Which pairs are connected.
        scale: Factor on query·key.
        alpha: 1.5, 1 for softmax, any other, or one per head as a tensor [heads].
        executor: "dense" computes every score and masks; "blocks" gathers key blocks and can be trained through; "flex"
            is FlexAttention for α = 1.5 or 1 and forward passes only; "auto" chooses by length.
        block_size: Tokens per block; raised to a multiple of the graph's unit.
        exact: Compute the graph's pairs only; off lets "blocks" keep whole blocks, which adds edges.
        bias: Added to the scores, as T5 does.
        dropout: Share of weights dropped.

    Raises:
        ConfigError: If the executor is unknown, or cannot do what is asked.
    """
    size = -(-block_size // graph.unit) * graph.unit
    chosen = executor
    if executor == "auto":
        can_gather = not graph.mask.vectorised and not isinstance(bias, Tensor)
        chosen = "blocks" if key.shape[2] >= BLOCKS_FROM and query.shape[2] > 1 and can_gather else "dense"
    if chosen == "dense":
        return masked_attention(query, key, value, graph, scale=scale, alpha=alpha, bias=bias, dropout=dropout)
    if chosen == "blocks":
        return gathered_attention(
            query, key, value, graph, scale=scale, alpha=alpha, size=size, exact=exact, bias=bias, dropout=dropout
        )
    if chosen == "flex":
        from graftwork.methods.sparsefinder.flex import flex_attention

        if bias is not None or dropout:
            raise ConfigError("executor flex has neither a position bias nor dropout. Use blocks or dense here.")
        return flex_attention(query, key, value, graph, scale=scale, alpha=alpha, size=size)
    raise ConfigError(f"executor is {executor!r}. Expected one of: auto, dense, blocks, flex.")


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: Graph | None,
    *,
    scale: float,
    alpha: float | Tensor = 1.5,
    allowed: Tensor | None = None,
    bias: Bias = None,
    dropout: float = 0.0,
) -> Tensor:
    """All scores, those outside the graph at −∞: what the others are held to. Simulated: it saves nothing.

    Without a graph, every pair that `allowed` permits is computed, or every pair at all.
    """
    repeats = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    scores = (query * scale) @ keys.mT
    whole = bias.block(0, query.shape[2], key.shape[2]) if isinstance(bias, PositionBias) else bias
    if whole is not None:
        scores = scores + whole
    permitted = graph.dense(query.device) if graph is not None else allowed
    if permitted is not None:
        scores = scores.masked_fill(~permitted, -torch.inf)
    weights = entmax(scores, per_head(alpha))
    return F.dropout(weights, dropout) @ values


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: Graph,
    *,
    scale: float,
    alpha: float | Tensor = 1.5,
    size: int = 64,
    exact: bool = True,
    bias: Bias = None,
    dropout: float = 0.0,
) -> Tensor:
    """For every block of queries, gather the key blocks that its graph touches, once each, and solve over all of them.

    Nothing of the size queries × keys is made. Blocks with like counts are computed together, so that the few rows of a
    global token do not widen the others.
    """
    if graph.mask.vectorised or isinstance(bias, Tensor):
        raise ConfigError("executor blocks needs a mask and a bias that are given by rule. Use executor dense here.")
    batch, heads, queries, _ = query.shape
    rows = -(-queries // size)
    query_blocks = _padded(query * scale, size).unflatten(2, (rows, size)).flatten(0, 2)
    groups, columns = key.shape[1], -(-key.shape[2] // size)
    key_blocks, value_blocks = (_padded(x, size).unflatten(2, (columns, size)).flatten(0, 2) for x in (key, value))
    parts, order = [], []
    for part in _row_groups(graph.coarse(size, query.device), size):
        gathered = (part.batch * groups + part.head * groups // heads)[:, None] * columns + part.columns
        scores = query_blocks[part.rows] @ key_blocks[gathered].flatten(1, 2).mT
        if isinstance(bias, PositionBias) and bias.table is not None:
            scores = scores + _gathered_bias(bias, part, size)
        if not _is_whole(graph, part, size, exact):
            scores = scores.masked_fill(~_gathered_pairs(graph, part, size, exact), -torch.inf)
        weights = entmax(scores, alpha[part.head, None, None] if isinstance(alpha, Tensor) else alpha)
        parts.append(F.dropout(weights, dropout) @ value_blocks[gathered].flatten(1, 2))
        order.append(part.rows)
    output = value.new_zeros(batch * heads * rows, size, value.shape[-1])
    if parts:
        output = output.index_copy(0, torch.cat(order), torch.cat(parts))
    return output.unflatten(0, (batch, heads, rows)).flatten(2, 3)[:, :, :queries]


def empty_rows(graph: Graph, rows_at_once: int = 1024) -> Tensor:
    """Real queries without any connected key, counted per head [batch heads]."""
    counts = []
    for start in range(0, graph.mask.queries, rows_at_once):
        stop = min(start + rows_at_once, graph.mask.queries)
        empty = ~graph.rows(start, stop).any(-1)
        if graph.query_real is not None:
            empty = empty & graph.query_real[:, None, start:stop]
        counts.append(empty.sum(-1))
    return torch.stack(counts).sum(0)


def per_head(alpha: float | Tensor) -> float | Tensor:
    """α as it broadcasts against scores [batch heads queries keys]."""
    return alpha[:, None, None] if isinstance(alpha, Tensor) else alpha


def _gathered_bias(bias: PositionBias, part: _Rows, size: int) -> Tensor:
    query, key = _gathered_positions(part, size)
    table: Any = bias.table
    bucket_of: Any = bias.bucket_of
    buckets = bucket_of(key[:, None, :] - (query + bias.query_offset)[:, :, None])
    return table[buckets, part.head[:, None, None]]
