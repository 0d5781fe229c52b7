"""Attention along a graph with three equivalent executors: masked, gathered key blocks, FlexAttention."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.gathering import (
    FUSED_AT_ONCE,
    SCORES_AT_ONCE,
    BlockRows,
    all_pairs_kept,
    gathered_indices,
    gathered_pairs,
    gathered_positions,
    gathered_scores,
    past_pairs,
    row_groups,
    split_blocks,
    whole_past,
)
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.methods.sparsefinder.sorting import sort_graph, sorted_attention
from graftwork.methods.sparsefinder.tensors import unflatten
from graftwork.surgery.masks import PositionBias
from graftwork.surgery.precision import attention_scores, compute_dtype, weighted_values

BLOCKS_FROM = 1024
"""Number of keys from which `auto` gathers blocks; below, gathering is not reliably faster."""
BLOCKS_ALWAYS_FROM = 8192
"""Number of keys from which `auto` gathers blocks of any graph, because all scores take too much memory."""
BLOCKS_KEPT = 0.6
"""Share of all blocks above which `auto` computes all scores, because gathering costs more than it saves."""

Bias = PositionBias | Tensor | None
"""Term added to the scores: a relative position bias, a tensor [batch heads queries keys], or none."""


def sparse_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    graph: Graph,
    *,
    scale: float | Float[Tensor, " heads"],
    alpha: float | Tensor = 1.5,
    executor: str = "auto",
    block_size: int = 64,
    exact: bool = True,
    bias: Bias = None,
    dropout: float = 0.0,
    sort: bool = False,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Attend along a graph: entmax_α(scale · q·k + bias) over the connected keys of every query, times the values.

    A query without a connected key yields zeros.

    Source: section 8.3 of the specification. Differs from the authors' layers: no key counts twice, and an empty row
    yields zeros instead of dense attention.

    Args:
        query: Queries.
        key: Keys; the number of heads is a multiple of the number of groups.
        value: Values.
        graph: Connected pairs.
        scale: Factor on query·key, one number or one per head.
        alpha: 1.5, 1 for softmax, any other number, or one per head as a tensor [heads].
        executor: "dense" computes all scores and masks them; "blocks" gathers key blocks and supports training; "flex"
            is FlexAttention for α = 1.5 or 1, forward pass only; "auto" chooses by length and kept blocks.
        block_size: Tokens per block; raised to a multiple of the graph's unit.
        exact: Compute the edges of the graph only; off keeps whole gathered blocks in "blocks", which adds edges.
        bias: Term added to the scores, as in T5.
        dropout: Dropout probability of the attention weights.
        sort: Sort queries and keys by bucket before blocks are gathered: the same result with fewer blocks.

    Raises:
        ConfigError: If the executor is unknown or does not support the arguments.
    """
    query, scale = folded_scale(query, scale)
    size = graph.gathered_size(block_size)
    chosen = chosen_executor(graph, executor, bias, size, sort=sort)
    if chosen == "blocks" and sort:
        if bias is not None:
            raise ConfigError("Found a position bias with sorted tokens. Expected scores of queries and keys alone.")
        return sorted_attention(query, key, value, graph, scale=scale, alpha=alpha, size=size, dropout=dropout)
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


def folded_scale(
    query: Float[Tensor, "batch heads queries width"], scale: float | Float[Tensor, " heads"]
) -> tuple[Float[Tensor, "batch heads queries width"], float]:
    """Queries and one factor on query·key; factors of heads are multiplied into the queries.

    Args:
        query: Queries.
        scale: Factor on query·key, one number or one per head.
    """
    return (query * scale.to(query.dtype)[:, None, None], 1.0) if isinstance(scale, Tensor) else (query, scale)


def chosen_executor(
    graph: Graph, executor: str = "auto", bias: Bias = None, size: int = 64, *, sort: bool = False
) -> str:
    """Executor that `sparse_attention` uses: the given one, or the choice of auto.

    auto gathers blocks of long inputs if the graph leaves out enough of them, or if all scores would not fit.

    Args:
        graph: Connected pairs.
        executor: Name of the executor, or auto.
        bias: Term added to the scores.
        size: Tokens per gathered block.
        sort: True if tokens are sorted by bucket before blocks are gathered.
    """
    if executor != "auto":
        return executor
    mask = graph.mask
    if mask.keys < BLOCKS_FROM or mask.queries == 1 or mask.vectorised or isinstance(bias, Tensor):
        return "dense"
    if mask.keys >= BLOCKS_ALWAYS_FROM:
        return "blocks"
    kept = (sort_graph(graph) if sort else graph).coarse(size).float().mean()
    return "blocks" if float(kept) <= BLOCKS_KEPT else "dense"


def masked_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    graph: Graph | None,
    *,
    scale: float | Float[Tensor, " heads"],
    alpha: float | Tensor = 1.5,
    allowed: Bool[Tensor, "... queries keys"] | None = None,
    bias: Bias = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Compute all scores and mask the pairs outside the graph with −∞: the definition for the other executors.

    Simulated sparsity: no time or memory is saved.

    Args:
        query: Queries.
        key: Keys; the number of heads is a multiple of the number of groups.
        value: Values.
        graph: Connected pairs; None uses `allowed`.
        scale: Factor on query·key, one number or one per head.
        alpha: 1.5, 1 for softmax, any other number, or one per head as a tensor [heads].
        allowed: Mask without a graph; broadcasts against [batch heads queries keys]. None allows every pair.
        bias: Term added to the scores.
        dropout: Dropout probability of the attention weights.
    """
    scores = attention_scores(query, key, scale, centred=True)  # [batch heads queries keys]
    whole = bias.block(0, query.shape[2], key.shape[2]) if isinstance(bias, PositionBias) else bias
    if whole is not None:
        scores = scores + whole
    permitted = graph.dense(query.device) if graph is not None else allowed
    if permitted is not None:
        scores = scores.masked_fill(~permitted, -torch.inf)
    weights = entmax(scores, per_head(alpha))
    return weighted_values(F.dropout(weights, dropout), value)


def gathered_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    graph: Graph,
    *,
    scale: float,
    alpha: float | Tensor = 1.5,
    size: int = 64,
    exact: bool = True,
    bias: Bias = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Gather the key blocks that each query block needs, once each, and solve entmax over all of them.

    No tensor of size queries × keys is allocated. Query blocks with similar numbers of key blocks are batched, so that
    the few rows of a global token do not pad the others.

    Args:
        query: Queries.
        key: Keys; the number of heads is a multiple of the number of groups.
        value: Values.
        graph: Connected pairs.
        scale: Factor on query·key.
        alpha: 1.5, 1 for softmax, any other number, or one per head as a tensor [heads].
        size: Tokens per block, a multiple of the graph's unit.
        exact: Compute the edges of the graph only; off keeps whole blocks.
        bias: Relative position bias.
        dropout: Dropout probability of the attention weights.

    Raises:
        ConfigError: If the mask or the bias is a tensor of queries × keys.
    """
    if graph.mask.vectorised or isinstance(bias, Tensor):
        raise ConfigError("executor blocks needs a mask and a bias that are given by rule. Use executor dense here.")
    batch, heads, queries, _ = query.shape
    rows, groups, columns = -(-queries // size), key.shape[1], -(-key.shape[2] // size)
    query_blocks = split_blocks(query, size)  # [batch·heads·rows size width]
    key_blocks, value_blocks = split_blocks(key, size), split_blocks(value, size)  # [batch·groups·columns size width]
    parts: list[Tensor] = []
    order: list[Tensor] = []
    # SDPA has no second derivative, and computes half precision in half precision on some devices
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    softmax = not isinstance(alpha, Tensor) and alpha == 1.0
    fused = softmax and not trained and bias is None and not dropout and query.dtype == compute_dtype(query.dtype)
    coarse = graph.coarse(size, query.device)
    # the own block is then the last one of every query block
    whole = whole_past(graph, exact) and bool(coarse.diagonal(dim1=2, dim2=3).all())
    at_once = FUSED_AT_ONCE if fused else SCORES_AT_ONCE
    for part in row_groups(coarse, size, filler=not whole, at_once=at_once):
        gathered = gathered_indices(part, heads, groups, columns)
        if whole:
            pairs = past_pairs(size, part.columns.shape[1], query.device)  # [size gathered·size]
        else:
            pairs = None if all_pairs_kept(graph, part, size, exact) else gathered_pairs(graph, part, size, exact)
        if fused:
            parts.append(_softmax_part(query_blocks[part.rows], key_blocks, value_blocks, gathered, pairs, scale))
            order.append(part.rows)
            continue
        # [part size gathered·size]
        scores = gathered_scores(query_blocks[part.rows], key_blocks[gathered], scale, centred=True)
        if isinstance(bias, PositionBias):
            scores = scores + _gathered_bias(bias, part, size)
        if pairs is not None:
            scores = scores.masked_fill(~pairs, -torch.inf)
        weights = entmax(scores, alpha[part.head, None, None] if isinstance(alpha, Tensor) else alpha)  # α [part 1 1]
        chosen = value_blocks[gathered].flatten(1, 2)  # [part gathered·size value_width]
        parts.append(weighted_values(F.dropout(weights, dropout)[:, None], chosen[:, None])[:, 0])
        order.append(part.rows)
    output = value.new_zeros(batch * heads * rows, size, value.shape[-1])
    if parts:
        output = output.index_copy(0, torch.cat(order), torch.cat(parts))
    # [batch heads rows size value_width] → [batch heads queries value_width]
    return unflatten(output, 0, (batch, heads, rows)).flatten(2, 3)[:, :, :queries]


def _softmax_part(
    query: Tensor, key_blocks: Tensor, value_blocks: Tensor, gathered: Tensor, pairs: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention of a group of query blocks by SDPA [part size value_width]; rows without a key yield zeros."""
    # [part gathered size width] → [part 1 gathered·size width]
    keys, values = (blocks[gathered].flatten(1, 2)[:, None] for blocks in (key_blocks, value_blocks))
    mask = pairs[:, None] if pairs is not None and pairs.ndim == 3 else pairs
    output = F.scaled_dot_product_attention(query[:, None], keys, values, attn_mask=mask, scale=scale)[:, 0]
    # a shared mask has no empty row
    return output if mask is None or mask.ndim == 2 else output.masked_fill(~mask[:, 0].any(-1, keepdim=True), 0.0)


def empty_rows(graph: Graph, rows_at_once: int = 1024) -> Int[Tensor, "batch heads"]:
    """Number of non-padding queries without a connected key."""
    counts: list[Tensor] = []
    for start in range(0, graph.mask.queries, rows_at_once):
        stop = min(start + rows_at_once, graph.mask.queries)
        empty = ~graph.rows(start, stop).any(-1)  # [batch heads rows]
        if graph.query_real is not None:
            empty = empty & graph.query_real[:, None, start:stop]  # [batch 1 rows]
        counts.append(empty.sum(-1))
    return torch.stack(counts).sum(0)


def per_head(alpha: float | Tensor) -> float | Tensor:
    """Reshape `alpha`, a scalar or a tensor [heads], to broadcast against scores: [heads 1 1]."""
    return alpha[:, None, None] if isinstance(alpha, Tensor) else alpha


def _gathered_bias(bias: PositionBias, part: BlockRows, size: int) -> Tensor:
    """Position bias at gathered positions [rows size gathered·size]."""
    query, key = gathered_positions(part, size)
    # head [rows 1 1], query [rows size 1], key [rows 1 gathered·size]
    return bias.at(part.head[:, None, None], query[:, :, None], key[:, None, :])
