"""Gathered key blocks: attention along a graph on the pairs it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.sparsefinder.entmax import entmax15_threshold
from graftwork.methods.sparsefinder.graphs import Graph

SCORES_AT_ONCE = 1 << 17
"""Scores that the gathered executor holds at once, so that they stay in the cache; a backward pass keeps more."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some query blocks with the key blocks that each of them needs."""

    rows: Tensor
    """Numbers of the query blocks, over batch × heads × blocks."""
    batch: Tensor
    head: Tensor
    block: Tensor
    columns: Tensor
    """Key blocks of each, ascending; those past its count are fillers."""
    count: Tensor


def gathered_threshold(query: Tensor, key: Tensor, graph: Graph, *, scale: float, size: int) -> Tensor:
    """τ of every query over its connected keys, for 1.5-entmax; +∞ where there is none [batch heads queries]."""
    batch, heads, queries, _ = query.shape
    rows, groups, columns = -(-queries // size), key.shape[1], -(-key.shape[2] // size)
    query_blocks = _padded(query * (scale / 2), size).unflatten(2, (rows, size)).flatten(0, 2)
    key_blocks = _padded(key, size).unflatten(2, (columns, size)).flatten(0, 2)
    tau = query.new_full((batch * heads * rows, size), torch.inf, dtype=torch.float32)
    for part in _row_groups(graph.coarse(size, query.device), size):
        gathered = (part.batch * groups + part.head * groups // heads)[:, None] * columns + part.columns
        half = (query_blocks[part.rows] @ key_blocks[gathered].flatten(1, 2).mT).float()
        half = half.masked_fill_(~_gathered_pairs(graph, part, size, exact=True), -torch.inf)
        tau[part.rows] = entmax15_threshold(half)[..., 0]
    return tau.unflatten(0, (batch, heads, rows)).flatten(2)[:, :, :queries]


def _padded(tokens: Tensor, size: int) -> Tensor:
    missing = -tokens.shape[2] % size
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def _row_groups(coarse: Tensor, size: int) -> Iterator[_Rows]:
    """Query blocks grouped by their number of key blocks, rounded up by at most a quarter, a chunk at a time."""
    _, heads, rows, columns = coarse.shape
    flat = coarse.reshape(-1, columns)
    counts = flat.sum(-1)
    step = (2 ** (counts.clamp_min(1).float().log2().floor() - 2)).clamp_min(1).long()
    widths = torch.minimum(-(-counts // step) * step, counts.new_tensor(columns))
    for width in widths.unique().tolist():
        if width == 0:
            continue
        chosen = (widths == width).nonzero().flatten()
        for part in chosen.split(max(1, SCORES_AT_ONCE // (width * size * size))):
            order = flat[part].byte().sort(dim=-1, descending=True, stable=True).indices[:, :width]
            block = part % rows
            yield _Rows(part, part // (heads * rows), part // rows % heads, block, order, counts[part])


def _gathered_positions(part: _Rows, size: int) -> tuple[Tensor, Tensor]:
    inside = torch.arange(size, device=part.rows.device)
    query = part.block[:, None] * size + inside
    key = (part.columns[:, :, None] * size + inside).flatten(1)
    return query, key


def _gathered_pairs(graph: Graph, part: _Rows, size: int, exact: bool) -> Tensor:
    """Which of the gathered pairs are computed [rows size gathered]."""
    mask, (query, key) = graph.mask, _gathered_positions(part, size)
    real = torch.arange(part.columns.shape[1], device=query.device) < part.count[:, None]
    valid = real.repeat_interleave(size, 1) & (key < mask.keys)
    inside = key.clamp_max(mask.keys - 1)
    if mask.padding is not None:
        valid = valid & mask.padding.to(query.device)[part.batch[:, None], inside]
    pairs = valid[:, None, :].expand(-1, size, -1)
    at_query, at_key = (query + mask.query_offset)[:, :, None], (key + mask.key_offset)[:, None, :]
    if mask.causal:
        pairs = pairs & (at_key <= at_query)
    if mask.predicate is not None:
        numbers = (part.batch[:, None, None], part.head[:, None, None])
        pairs = pairs & mask.predicate(*numbers, at_query, (inside + mask.key_offset)[:, None, :])
    row = query.clamp_max(mask.queries - 1)
    if graph.query_real is not None:
        pairs = pairs & graph.query_real[part.batch[:, None], row][:, :, None]
    if exact and size != graph.unit:
        pairs = pairs & _token_pairs(graph, part, row, inside)
    return pairs


def _is_whole(graph: Graph, part: _Rows, size: int, exact: bool) -> bool:
    """Whether every gathered pair is in the graph, so that nothing needs to be masked."""
    mask = graph.mask
    rules = mask.causal or mask.padding is not None or mask.predicate is not None or graph.query_real is not None
    whole = not rules and mask.keys % size == 0 and (size == graph.unit or not exact)
    return whole and bool((part.count == part.columns.shape[1]).all())


def _token_pairs(graph: Graph, part: _Rows, row: Tensor, column: Tensor) -> Tensor:
    """The graph itself at gathered positions, before the mask."""
    batch, head = part.batch[:, None], part.head[:, None]
    found = torch.zeros((), dtype=torch.bool, device=row.device)
    if graph.query_buckets is not None and graph.key_buckets is not None:
        query = graph.query_buckets.expand(-1, graph.heads, -1, -1)[batch, head, row // graph.unit]
        key = graph.key_buckets.expand(-1, graph.heads, -1, -1)[batch, head, column // graph.unit]
        found = (query.float() @ key.float().mT) > 0
    if graph.edges is not None:
        edges = graph.edges.expand(graph.mask.batch, graph.heads, -1, -1)
        found = (
            found
            | edges[batch[..., None], head[..., None], row[:, :, None] // graph.unit, column[:, None, :] // graph.unit]
        )
    if graph.pattern:
        starts = graph.starts().to(row.device)[part.batch][:, None]
        last_query, last_key = (ends.to(row.device)[part.batch][:, None] - 1 for ends in graph.lengths)
        query, key = row + graph.mask.query_offset, column + graph.mask.key_offset
        places = [(place - starts) // graph.unit for place in (query, key, last_query, last_key)]
        found = found | graph.pattern.edges(
            places[0][:, :, None], places[1][:, None, :], places[2][..., None], places[3][..., None]
        )
    return found
