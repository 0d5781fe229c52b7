"""Recall, kept probability mass and kept blocks of one graph on the queries and keys it was predicted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.graphs import Graph, blocks_of, gold_pairs, unfold
from graftwork.methods.sparsefinder.sorting import is_sortable, sort_graph
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.precision import attention_scores

ROWS_AT_ONCE = 256
"""Number of queries whose scores are in memory at a time."""
BLOCK_SIZES = (64, 16)
"""Tokens per block of the reported shares of kept blocks."""


@dataclass(frozen=True)
class GraphQuality:
    """Quality of a graph, averaged over heads."""

    sparsity: float
    """Share of allowed pairs outside the graph."""
    recall: float
    """Share of the gold pairs in the graph."""
    mass: float
    """Attention probability of the pairs in the graph, averaged over queries."""
    kept_blocks: dict[int, float]
    """Share of the allowed key blocks that contain an edge, by tokens per block."""


@torch.no_grad()
def graph_quality(
    query: Float[Tensor, "1 heads queries width"],
    key: Float[Tensor, "1 groups keys width"],
    graph: Graph,
    *,
    scale: float | Float[Tensor, " heads"],
    alpha: float | Tensor,
    gold_alpha: float | None = None,
    sizes: Sequence[int] = BLOCK_SIZES,
) -> GraphQuality:
    """Compare a graph with the attention of the same queries and keys, without a tensor of queries × keys.

    Args:
        query: Queries of one sequence.
        key: Keys of one sequence.
        graph: Graph to measure.
        scale: Factor on query·key.
        alpha: α of the attention, a number or one per head [heads 1 1].
        gold_alpha: α of the gold graph; by default that of the attention, and for softmax the smallest set of keys with
            95 % of the mass.
        sizes: Tokens per block of the shares of kept blocks.
    """
    found, gold, both, allowed = (torch.zeros(query.shape[1], dtype=torch.double) for _ in range(4))
    mass = torch.zeros_like(found)
    rows = 0
    for start in range(0, query.shape[2], ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, query.shape[2])
        weights, permitted = probabilities(query, key, graph.mask, start, stop, scale=scale, alpha=alpha)
        if gold_alpha is None:
            true = gold_pairs(weights, softmax=not isinstance(alpha, Tensor) and alpha == 1.0)
        else:
            true = probabilities(query, key, graph.mask, start, stop, scale=scale, alpha=gold_alpha)[0] > 0
        edges = graph.rows(start, stop, query.device)[0]  # [heads rows keys]
        found += _total(edges)
        gold += _total(true)
        both += _total(edges & true)
        allowed += _total(permitted.expand_as(edges))
        mass += (weights * edges).sum((1, 2)).double().cpu()
        rows += int(permitted.any(-1).sum())
    return GraphQuality(
        float((1 - found / allowed.clamp_min(1)).mean()),
        float((both / gold.clamp_min(1)).mean()),
        float(mass.mean()) / max(1, rows),
        {size: kept_blocks(graph, size) for size in sizes},
    )


def probabilities(
    query: Float[Tensor, "1 heads queries width"],
    key: Float[Tensor, "1 groups keys width"],
    mask: LazyMask,
    start: int,
    stop: int,
    *,
    scale: float | Float[Tensor, " heads"],
    alpha: float | Tensor,
) -> tuple[Float[Tensor, "heads rows keys"], Bool[Tensor, "1 rows keys"]]:
    """Attention probabilities of the queries start…stop over all allowed keys, and the allowed pairs.

    Args:
        query: Queries of one sequence.
        key: Keys of one sequence.
        mask: Mask of the whole sequence.
        start: First query.
        stop: One past the last query.
        scale: Factor on query·key.
        alpha: α of the attention, a number or one per head [heads 1 1].
    """
    scores = attention_scores(query[:, :, start:stop], key, scale, centred=True)  # [1 heads rows keys]
    block = mask.block(start, stop, device=query.device)
    permitted = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device) if block is None else block
    # [1 1 rows keys]
    permitted = permitted.expand(1, permitted.shape[1], stop - start, key.shape[2])
    return entmax(scores.masked_fill(~permitted, -torch.inf), alpha)[0], permitted[0]


def kept_blocks(graph: Graph, size: int) -> float:
    """Share of the allowed blocks of `size` × `size` tokens that contain an edge, averaged over heads."""
    allowed = graph.allowed_blocks(size).expand(graph.mask.batch, graph.heads, -1, -1)
    if size % graph.unit == 0:
        found = graph.coarse(size)
    elif graph.unit % size == 0:
        # [batch heads units units] → [batch heads rows columns]
        found = unfold(graph.coarse(graph.unit), graph.unit // size)[:, :, : allowed.shape[2], : allowed.shape[3]]
    else:
        found = blocks_of(graph.dense(), size)
    return float((found & allowed).sum()) / max(1, int(allowed.sum()))


def sorted_kept_blocks(graph: Graph, size: int) -> float | None:
    """Number of blocks of `size` tokens that can contain an edge after sorting by bucket; None for other graphs.

    Returned as a share of the blocks that are allowed in the given order, to be comparable with `kept_blocks`. The
    keys of the band and of global tokens, which are gathered one by one, do not count.
    """
    if not is_sortable(graph):
        return None
    allowed = graph.allowed_blocks(size).expand(graph.mask.batch, graph.heads, -1, -1)
    return float(sort_graph(graph).coarse(size).sum()) / max(1, int(allowed.sum()))


def _total(flags: Tensor) -> Tensor:
    """Number of True of each head [heads] of `flags` [heads rows keys]."""
    return flags.sum((1, 2)).double().cpu()
