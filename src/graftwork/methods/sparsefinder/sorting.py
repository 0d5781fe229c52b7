"""Queries and keys sorted by bucket before blocks are gathered, so that tokens of one bucket share blocks.

The order changes which pairs share a block, not which pairs are edges: every gathered pair is tested at its original
positions, causality and padding included, so the result is that of the unsorted order up to the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.gathering import (
    BlockRows,
    Order,
    gathered_pairs,
    gathered_positions,
    gathered_scores,
    row_groups,
    split_blocks,
)
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, share_bucket
from graftwork.methods.sparsefinder.tensors import unflatten
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.precision import attention_scores, weighted_values


@dataclass(frozen=True, slots=True, eq=False)
class SortedGraph:
    """A graph of buckets with an order of its queries and keys, and the pairs that are gathered one by one."""

    graph: Graph
    """The buckets without band; the global queries of the pattern share a bucket with every key."""
    pattern: Pattern
    """Band and global keys, which are gathered for each query, because their tokens are far apart in the order."""
    order: Order

    @property
    def mask(self) -> LazyMask:
        """Padding, causality and any other mask rule, at original positions."""
        return self.graph.mask

    def coarse(self, size: int, device: torch.device | str | None = None) -> Bool[Tensor, "batch heads rows columns"]:
        """Block graph in the order: True for blocks of `size` queries and keys that can contain an edge of a bucket.

        The result is an upper bound, as that of an unsorted graph.
        """
        graph, mask = self.graph, self.graph.mask
        flags = [
            _moved(buckets, order)
            for buckets, order in (
                (graph.query_buckets, self.order.query),
                (graph.key_buckets, self.order.key),
            )
            if buckets is not None
        ]
        found = share_bucket(*(_pooled(each, size) for each in flags))
        if mask.causal:
            queries, keys = self.order.query + mask.query_offset, self.order.key + mask.key_offset
            last = _pooled_positions(queries, size, -1).amax(3)  # [batch heads rows]
            first = _pooled_positions(keys, size, mask.keys + mask.key_offset + mask.queries).amin(3)
            found = found & (first[:, :, None, :] <= last[..., None])
        return found if device is None else found.to(device)


def is_sortable(graph: Graph) -> bool:
    """True if sorting can bring connected tokens together: the graph consists of buckets of single tokens."""
    return graph.query_buckets is not None and graph.key_buckets is not None and graph.edges is None and graph.unit == 1


def sort_graph(graph: Graph) -> SortedGraph:
    """Order the queries and the keys of every head by bucket, and by position within a bucket.

    Tokens in several buckets are ordered by the first and then by the last of them; padding is last.

    Raises:
        ConfigError: If the graph does not consist of buckets of single tokens.
    """
    query, key = graph.query_buckets, graph.key_buckets
    if query is None or key is None or not is_sortable(graph):
        raise ConfigError(
            "Found a graph without buckets of single tokens. Expected one of grouping kmeans, quantize, reformer or "
            "routing with block_size 1. Switch sorting off."
        )
    mask, pattern, device = graph.mask, graph.pattern, query.device
    batch, heads = mask.batch, graph.heads
    query = _without_padding(query.expand(batch, heads, -1, -1), graph.query_real)
    key = _without_padding(key.expand(batch, heads, -1, -1), mask.padding)
    order = Order(_by_bucket(query), _by_bucket(key))
    if pattern.first or pattern.last:
        place, first, last, _ = _places(graph, device)
        whole = torch.zeros_like(place, dtype=torch.bool)  # [batch queries]
        whole = whole | (place == first) if pattern.first else whole
        whole = whole | (place == last) if pattern.last else whole
        # one more bucket, of every key and of the global queries
        query = torch.cat([query, whole[:, None, :, None].expand(-1, heads, -1, -1)], -1)
        key = F.pad(key, (0, 1), value=True)
    return SortedGraph(replace(graph, query_buckets=query, key_buckets=key, pattern=Pattern()), pattern, order)


def sorted_attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    graph: Graph,
    *,
    scale: float,
    alpha: float | Tensor = 1.5,
    size: int = 64,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Attend along a graph of buckets with queries and keys sorted by bucket; the result is that of the given order.

    Args:
        query: Queries.
        key: Keys; the number of heads is a multiple of the number of groups.
        value: Values.
        graph: Connected pairs, by buckets of single tokens and a pattern.
        scale: Factor on query·key.
        alpha: 1.5, 1 for softmax, any other number, or one per head as a tensor [heads].
        size: Tokens per block of the sorted sequence.
        dropout: Dropout probability of the attention weights.

    Raises:
        ConfigError: If the graph does not consist of buckets of single tokens, or its mask is not given by rule.
    """
    if graph.mask.vectorised:
        raise ConfigError("executor blocks needs a mask that is given by rule. Use executor dense here.")
    ordered = sort_graph(graph)
    batch, heads, queries, _ = query.shape
    rows = -(-queries // size)
    # heads have orders of their own, so keys of groups are repeated
    own_key, own_value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    query_blocks = split_blocks(_moved(query, ordered.order.query), size)  # [batch·heads·rows size width]
    key_blocks, value_blocks = (split_blocks(_moved(x, ordered.order.key), size) for x in (own_key, own_value))
    columns = -(-key.shape[2] // size)
    parts: list[Tensor] = []
    places: list[Tensor] = []
    coarse = ordered.coarse(size)
    if ordered.pattern:
        # every query has single keys, also those whose buckets have no key
        coarse = coarse | ~coarse.any(-1, keepdim=True) & (torch.arange(columns, device=coarse.device) == 0)
    for part in row_groups(coarse, size):
        gathered = (part.batch * heads + part.head)[:, None] * columns + part.columns  # [part gathered]
        own = query_blocks[part.rows]  # [part size width]
        scores = gathered_scores(own, key_blocks[gathered], scale, centred=False)  # [part size gathered·size]
        scores = scores.masked_fill(~gathered_pairs(ordered.graph, part, size, True, ordered.order), -torch.inf)
        chosen = value_blocks[gathered].flatten(1, 2)  # [part gathered·size value_width]
        single_values: Tensor | None = None
        if ordered.pattern:
            at, valid = _single_keys(ordered, part, size)  # [part size singles]
            index = (part.batch[:, None, None], part.head[:, None, None], at)
            single_values = own_value[index]  # [part size singles value_width]
            # [part size 1 width] against [part size singles width] → [part size singles]
            extra = attention_scores(own[:, :, None], own_key[index], scale)[:, :, 0]
            scores = torch.cat([scores, extra.masked_fill(~valid, -torch.inf)], -1)
        weights = F.dropout(
            entmax(scores, alpha[part.head, None, None] if isinstance(alpha, Tensor) else alpha), dropout
        )
        blocks = weights[..., : chosen.shape[1]]  # [part size gathered·size]
        output = weighted_values(blocks[:, None], chosen[:, None])[:, 0]
        if single_values is not None:
            rest = weights[..., None, chosen.shape[1] :]  # [part size 1 singles]
            output = output + weighted_values(rest, single_values)[:, :, 0]
        parts.append(output)
        places.append(part.rows)
    result = value.new_zeros(batch * heads * rows, size, value.shape[-1])
    if parts:
        result = result.index_copy(0, torch.cat(places), torch.cat(parts))
    # [batch·heads·rows size value_width] → [batch heads queries value_width], in the order
    result = unflatten(result, 0, (batch, heads, rows)).flatten(2, 3)[:, :, :queries]
    return _moved(result, ordered.order.query.argsort(-1))


def _single_keys(
    ordered: SortedGraph, part: BlockRows, size: int
) -> tuple[Int[Tensor, "rows size singles"], Bool[Tensor, "rows size singles"]]:
    """Keys of the band and global keys of every query of a group, and True for those that no bucket connects.

    Every key is valid once at most.
    """
    graph, mask, pattern = ordered.graph, ordered.graph.mask, ordered.pattern
    query, _ = gathered_positions(part, size)
    batch, head = part.batch[:, None], part.head[:, None]  # [rows 1]
    row = ordered.order.query[batch, head, query.clamp_max(mask.queries - 1)]  # [rows size]
    _, first, _, last = (x.expand(mask.batch, -1)[part.batch] for x in _places(graph, row.device))  # [rows …]
    place = row + mask.query_offset
    found: list[Tensor] = []
    if pattern.window:
        steps = torch.arange(1 - (pattern.window + 1) // 2, pattern.window // 2 + 1, device=row.device)
        found.append(place[..., None] + steps)  # [rows size window]
    ends = [end for end, used in ((first, pattern.first), (last, pattern.last)) if used]
    found += [end[:, :, None].expand(-1, size, -1) for end in ends]
    at = torch.cat(found, -1)  # [rows size singles]
    valid = torch.ones_like(at, dtype=torch.bool)
    near = pattern.window or 0
    for number, end in enumerate(ends):
        distance = end - place  # [rows size]
        fresh = ~((distance >= 1 - (near + 1) // 2) & (distance <= near // 2)) if near else torch.ones_like(place) > 0
        fresh = fresh if number == 0 else fresh & (end != ends[0])
        valid[..., near + number] = fresh
    column = at - mask.key_offset
    valid &= (column >= 0) & (column < mask.keys)
    column = column.clamp(0, mask.keys - 1)
    if mask.causal:
        valid &= at <= place[..., None]
    if mask.padding is not None:
        valid &= mask.padding.to(row.device)[part.batch[:, None, None], column]
    if mask.predicate is not None:
        numbers = (part.batch[:, None, None], part.head[:, None, None])
        valid &= mask.predicate(*numbers, place[..., None], column + mask.key_offset)
    if graph.query_real is not None:
        valid &= graph.query_real[batch, row][..., None]
    if graph.query_buckets is not None and graph.key_buckets is not None:
        own = graph.query_buckets[batch, head, row]  # [rows size buckets]
        other = graph.key_buckets[batch[..., None], head[..., None], column]  # [rows size singles buckets]
        valid &= ~(own[:, :, None] & other).any(-1)
    return column, valid


def _places(graph: Graph, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the queries [batch or 1, queries], and of the first token and last query and key [batch 1]."""
    mask = graph.mask
    place = torch.arange(mask.queries, device=device)[None] + mask.query_offset
    last_query, last_key = (ends.to(device)[:, None] - 1 for ends in graph.lengths)
    first = graph.starts().to(device)[:, None]
    return place.expand(mask.batch, -1), first, last_query, last_key


def _without_padding(flags: Tensor, real: Tensor | None) -> Tensor:
    """Bucket flags [batch heads tokens buckets], all False for padding."""
    return flags if real is None else flags & real.to(flags.device)[:, None, :, None]  # [batch 1 tokens 1]


def _by_bucket(flags: Bool[Tensor, "batch heads tokens buckets"]) -> Int[Tensor, "batch heads tokens"]:
    """Tokens in ascending order of their first, then of their last bucket; tokens in no bucket are last."""
    count = flags.shape[-1]
    number = torch.arange(count, device=flags.device)
    first = torch.where(flags, number, count).amin(-1)  # [batch heads tokens]
    last = torch.where(flags, number, 0).amax(-1)
    return (first * count + last).argsort(dim=-1, stable=True)


def _moved(tensor: Tensor, order: Int[Tensor, "batch heads tokens"]) -> Tensor:
    """Tokens of `tensor` [batch heads tokens width] in another order."""
    return tensor.gather(2, order[..., None].expand(*order.shape, tensor.shape[-1]))


def _pooled(flags: Tensor, size: int) -> Tensor:
    """Buckets of blocks as the union over their tokens [batch heads blocks buckets]."""
    padded = F.pad(flags, (0, 0, 0, -flags.shape[2] % size))
    return unflatten(padded, 2, (-1, size)).any(3)  # [batch heads blocks size buckets] → any over size


def _pooled_positions(places: Int[Tensor, "batch heads tokens"], size: int, filler: int) -> Tensor:
    """Positions by block [batch heads blocks size]; the last block is filled with `filler`."""
    return unflatten(F.pad(places, (0, -places.shape[2] % size), value=filler), 2, (-1, size))
