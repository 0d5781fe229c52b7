"""Gathered key blocks: the block layout, pair masks and thresholds behind executor `blocks`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.sparsefinder.entmax import entmax15_threshold
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.methods.sparsefinder.tensors import integers, unflatten, unique
from graftwork.surgery.precision import attention_scores, compute_dtype

SCORES_AT_ONCE = 1 << 17
"""Scores held at once in the forward pass, so that they fit the CPU cache; a backward pass keeps more."""
FUSED_AT_ONCE = 1 << 21
"""Scores computed by one call of fused attention, which holds few of them; less memory, but more calls if smaller."""


@dataclass(frozen=True, slots=True)
class BlockRows:
    """A group of query blocks, each with the key blocks that it needs."""

    rows: Int[Tensor, " rows"]
    """Indices of the query blocks in the flattened dimension batch · heads · blocks."""
    batch: Int[Tensor, " rows"]
    """Batch index of each query block."""
    head: Int[Tensor, " rows"]
    """Head index of each query block."""
    block: Int[Tensor, " rows"]
    """Index of each query block within its sequence."""
    columns: Int[Tensor, "rows gathered"]
    """Key blocks of each query block in ascending order; entries past `count` are filler."""
    count: Int[Tensor, " rows"]
    """Number of valid entries in each row of `columns`."""


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Order in which queries and keys are split into blocks, other than by position."""

    query: Int[Tensor, "batch heads queries"]
    """Index of the query at each place of the order."""
    key: Int[Tensor, "batch heads keys"]
    """Index of the key at each place of the order."""


def pad_to_blocks(tokens: Float[Tensor, "batch heads tokens width"], size: int) -> Tensor:
    """Pad the token dimension of `tokens` with zeros to a multiple of `size`."""
    missing = -tokens.shape[2] % size
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def split_blocks(tokens: Float[Tensor, "batch heads tokens width"], size: int) -> Float[Tensor, "blocks size width"]:
    """Blocks of `size` tokens over batch, heads and positions, the last one padded with zeros."""
    count = -(-tokens.shape[2] // size)
    blocks = unflatten(pad_to_blocks(tokens, size), 2, (count, size))  # [batch heads blocks size width]
    return blocks.flatten(0, 2)  # [batch·heads·blocks size width]


def row_groups(
    coarse: Bool[Tensor, "batch heads rows columns"], size: int, *, filler: bool = True, at_once: int = SCORES_AT_ONCE
) -> Iterator[BlockRows]:
    """Group query blocks by their number of key blocks, rounded up by at most a quarter, in chunks.

    Args:
        coarse: Block graph: True for key blocks that a query block needs.
        size: Tokens per block.
        filler: Round the numbers up; off gives more groups, in which every key block is needed.
        at_once: Number of scores of a chunk.
    """
    _, heads, rows, columns = coarse.shape
    flat = coarse.reshape(-1, columns)  # [batch·heads·rows columns]
    counts = flat.sum(-1)
    step = (2 ** (counts.clamp_min(1).float().log2().floor() - 2)).clamp_min(1).long() if filler else 1
    widths = (-(-counts // step) * step).clamp_max(columns)
    for width in integers(unique(widths)):
        if width == 0:
            continue
        chosen = (widths == width).nonzero().flatten()
        for part in torch.split(chosen, max(1, at_once // (width * size * size))):
            order = flat[part].byte().sort(dim=-1, descending=True, stable=True).indices[:, :width]
            yield BlockRows(part, part // (heads * rows), part // rows % heads, part % rows, order, counts[part])


def gathered_positions(
    part: BlockRows, size: int
) -> tuple[Int[Tensor, "rows size"], Int[Tensor, "rows gathered_keys"]]:
    """Query positions and gathered key positions of a group, before the offsets of the mask."""
    inside = torch.arange(size, device=part.rows.device)  # [size]
    query = part.block[:, None] * size + inside  # [rows size]
    key = (part.columns[:, :, None] * size + inside).flatten(1)  # [rows gathered size] → [rows gathered·size]
    return query, key


def gathered_pairs(
    graph: Graph, part: BlockRows, size: int, exact: bool, order: Order | None = None
) -> Bool[Tensor, "rows size gathered_keys"]:
    """True for the gathered pairs that the mask allows and, if `exact`, that are edges of the graph.

    Args:
        graph: Connected pairs, by position.
        part: Query blocks with their key blocks.
        size: Tokens per block.
        exact: Exclude pairs that are no edges.
        order: Order of the tokens in the blocks; None for that of the sequence.
    """
    mask, (query, key) = graph.mask, gathered_positions(part, size)
    filled = torch.arange(part.columns.shape[1], device=query.device) < part.count[:, None]  # [rows gathered]
    valid = filled.repeat_interleave(size, 1) & (key < mask.keys)  # [rows gathered·size]
    inside, row = key.clamp_max(mask.keys - 1), query.clamp_max(mask.queries - 1)
    if order is not None:
        batch, head = part.batch[:, None], part.head[:, None]  # [rows 1]
        inside, row = order.key[batch, head, inside], order.query[batch, head, row]
        key, query = inside, row
    if mask.padding is not None:
        valid = valid & mask.padding.to(query.device)[part.batch[:, None], inside]
    pairs = valid[:, None, :].expand(-1, size, -1)  # [rows size gathered·size]
    # [rows size 1], [rows 1 gathered·size]
    at_query, at_key = (query + mask.query_offset)[:, :, None], (key + mask.key_offset)[:, None, :]
    if mask.causal:
        pairs = pairs & (at_key <= at_query)
    if mask.predicate is not None:
        numbers = (part.batch[:, None, None], part.head[:, None, None])  # [rows 1 1]
        pairs = pairs & mask.predicate(*numbers, at_query, (inside + mask.key_offset)[:, None, :])
    if graph.query_real is not None:
        pairs = pairs & graph.query_real[part.batch[:, None], row][:, :, None]  # [rows size 1]
    if exact and size != graph.unit:
        pairs = pairs & _token_pairs(graph, part, row, inside)
    return pairs


def all_pairs_kept(graph: Graph, part: BlockRows, size: int, exact: bool) -> bool:
    """True if every gathered pair is an edge, so that no mask is needed."""
    mask = graph.mask
    rules = mask.causal or mask.padding is not None or mask.predicate is not None or graph.query_real is not None
    whole = not rules and mask.keys % size == 0 and (size == graph.unit or not exact)
    return whole and bool((part.count == part.columns.shape[1]).all())


def whole_past(graph: Graph, exact: bool) -> bool:
    """True if every query attends to all keys of its gathered blocks up to its own position, as in a causal decoder.

    Only the own block of a query block then needs a mask.
    """
    mask = graph.mask
    rules = mask.padding is not None or mask.predicate is not None or graph.query_real is not None
    return (
        not exact and mask.causal and not rules and mask.queries == mask.keys and mask.query_offset == mask.key_offset
    )


def past_pairs(size: int, gathered: int, device: torch.device) -> Bool[Tensor, "size gathered_keys"]:
    """True for the pairs of a query block with whole past blocks and, at the end, with its own block."""
    past = torch.ones(size, (gathered - 1) * size, dtype=torch.bool, device=device)
    own = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return torch.cat([past, own], 1)


def gathered_threshold(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    graph: Graph,
    *,
    scale: float,
    size: int,
) -> tuple[Float[Tensor, "batch heads queries"], Float[Tensor, "batch heads queries"]]:
    """Row maximum m and threshold t of 1.5-entmax over the connected keys of every query.

    The weight of a score s is ((s − m − t)₊ / 2)²; t is +∞ for queries without a connected key.

    Args:
        query: Queries.
        key: Keys; the number of heads is a multiple of the number of groups.
        graph: Connected pairs.
        scale: Factor on query·key.
        size: Tokens per block.

    Returns:
        m and t, each [batch heads queries], in at least float32.
    """
    batch, heads, queries, _ = query.shape
    rows, groups, columns = -(-queries // size), key.shape[1], -(-key.shape[2] // size)
    query_blocks = split_blocks(query, size)  # [batch·heads·rows size width]
    key_blocks = split_blocks(key, size)  # [batch·groups·columns size width]
    top = query.new_zeros((batch * heads * rows, size), dtype=compute_dtype(query.dtype))
    threshold = torch.full_like(top, torch.inf)
    for part in row_groups(graph.coarse(size, query.device), size):
        gathered = gathered_indices(part, heads, groups, columns)
        scores = gathered_scores(query_blocks[part.rows], key_blocks[gathered], scale)  # [part size gathered·size]
        scores = scores.masked_fill(~gathered_pairs(graph, part, size, exact=True), -torch.inf)
        part_top, part_threshold = entmax15_threshold(scores)  # [part size 1]
        top[part.rows], threshold[part.rows] = part_top[..., 0], part_threshold[..., 0]
    # [batch heads rows·size] → [batch heads queries]
    both = [unflatten(x, 0, (batch, heads, rows)).flatten(2)[:, :, :queries] for x in (top, threshold)]
    return both[0], both[1]


def gathered_scores(
    query: Float[Tensor, "rows size width"],
    key: Float[Tensor, "rows gathered size width"],
    scale: float,
    *,
    centred: bool = False,
) -> Float[Tensor, "rows size gathered_keys"]:
    """Scores of query blocks and their gathered key blocks by `attention_scores`."""
    # [rows 1 size width], [rows 1 gathered·size width] → [rows 1 size gathered·size]
    return attention_scores(query[:, None], key.flatten(1, 2)[:, None], scale, centred=centred)[:, 0]


def gathered_indices(part: BlockRows, heads: int, groups: int, columns: int) -> Int[Tensor, "rows gathered"]:
    """Indices of the gathered key blocks in the flattened dimension batch · groups · columns."""
    group = part.batch * groups + part.head * groups // heads  # [rows]
    return group[:, None] * columns + part.columns


def _token_pairs(graph: Graph, part: BlockRows, row: Tensor, column: Tensor) -> Tensor:
    """Edges of the graph at gathered positions, before the mask [rows size gathered_keys]."""
    batch, head = part.batch[:, None], part.head[:, None]  # [rows 1]
    found = torch.zeros((), dtype=torch.bool, device=row.device)
    if graph.query_buckets is not None and graph.key_buckets is not None:
        query = graph.query_buckets.expand(-1, graph.heads, -1, -1)[batch, head, row // graph.unit]
        key = graph.key_buckets.expand(-1, graph.heads, -1, -1)[batch, head, column // graph.unit]
        found = (query.float() @ key.float().mT) > 0  # [rows size buckets] @ [rows buckets gathered_keys]
    if graph.edges is not None:
        edges = graph.edges.expand(graph.mask.batch, graph.heads, -1, -1)
        # indices [rows 1 1], [rows 1 1], [rows size 1], [rows 1 gathered_keys]
        key_unit = graph.key_unit or graph.unit
        size = row.shape[1]
        if key_unit % size == 0:
            # a gathered block is part of one column
            blocks = part.columns[:, None, :] * size // key_unit  # [rows 1 gathered]
            own = edges[batch[..., None], head[..., None], row[:, :, None] // graph.unit, blocks]
            found = found | own.repeat_interleave(size, -1)  # [rows size gathered] → [rows size gathered·size]
        else:
            units = row[:, :, None] // graph.unit, column[:, None, :] // key_unit
            found = found | edges[batch[..., None], head[..., None], units[0], units[1]]
    if graph.pattern:
        starts = graph.starts().to(row.device)[part.batch][:, None]  # [rows 1]
        last_query, last_key = (ends.to(row.device)[part.batch][:, None] - 1 for ends in graph.lengths)
        query, key = row + graph.mask.query_offset, column + graph.mask.key_offset
        places = [(place - starts) // graph.unit for place in (query, key, last_query, last_key)]
        # [rows size 1], [rows 1 gathered_keys], [rows 1 1], [rows 1 1]
        found = found | graph.pattern.edges(
            places[0][:, :, None], places[1][:, None, :], places[2][..., None], places[3][..., None]
        )
    return found
