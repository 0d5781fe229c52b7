"""Export of a graph for other kernels: FlexAttention's BlockMask, block lists, block-sparse rows, and sparse rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.flex import pair_function
from graftwork.methods.sparsefinder.graphs import Graph, blocks_of
from graftwork.methods.sparsefinder.tensors import unflatten

ROWS_AT_ONCE = 1024
"""Number of query rows of the graph that are built at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockLists:
    """Key blocks of every query block, in the form of FlashAttention-4's block-sparse tensors.

    Full blocks need no mask; masked blocks contain some connected pairs, and the pairs inside them follow from
    `pair_function` or from the token graph. Entries past the counts are 0.
    """

    mask_block_cnt: Int[Tensor, "batch heads rows"]
    """Number of masked key blocks."""
    mask_block_idx: Int[Tensor, "batch heads rows columns"]
    """Indices of the masked key blocks, ascending."""
    full_block_cnt: Int[Tensor, "batch heads rows"]
    """Number of full key blocks."""
    full_block_idx: Int[Tensor, "batch heads rows columns"]
    """Indices of the full key blocks, ascending."""
    block_size: int
    """Tokens per block."""

    def blocks(self) -> Bool[Tensor, "batch heads rows columns"]:
        """Block graph of the lists: True for masked and full blocks."""
        return _flags(self.mask_block_cnt, self.mask_block_idx) | _flags(self.full_block_cnt, self.full_block_idx)


def block_lists(graph: Graph, block_size: int = 128) -> BlockLists:
    """Convert a graph to lists of masked and full key blocks.

    A block is full if all its pairs are connected; blocks beyond the end of a sequence are never full.

    Args:
        graph: Graph to convert.
        block_size: Tokens per block.
    """
    some, full = _some_and_full(graph, block_size)
    masked = some & ~full
    return BlockLists(*_listed(masked), *_listed(full), block_size)


def flex_block_mask(graph: Graph, block_size: int = 128) -> BlockMask:
    """Convert a graph to a `BlockMask` of FlexAttention, with lists of masked and full blocks and its mask function.

    The lengths of queries and keys are those of the graph. A row without a connected key gives NaN in FlexAttention's
    softmax; `executors.empty_rows` counts such rows.

    Args:
        graph: Graph to convert.
        block_size: Tokens per block.
    """
    lists = block_lists(graph, block_size)
    device = lists.mask_block_cnt.device
    connected = pair_function(graph, device)
    queries, keys = graph.mask.queries, graph.mask.keys

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        inside = (row < queries) & (column < keys)
        return inside & connected(batch, head, row.clamp_max(queries - 1), column.clamp_max(keys - 1))

    return BlockMask.from_kv_blocks(
        lists.mask_block_cnt,
        lists.mask_block_idx,
        lists.full_block_cnt,
        lists.full_block_idx,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )


def csr_graph(graph: Graph, batch: int, head: int) -> Tensor:
    """Convert the token graph of one head to a sparse CSR tensor [queries keys] of ones."""
    rows = torch.cat([part[batch, head] for part in _rows(graph)])
    with _beta():
        return rows.float().to_sparse_csr()


def bsr_graph(graph: Graph, batch: int, head: int, block_size: int = 64) -> Tensor:
    """Convert the token graph of one head to a block-sparse BSR tensor [queries keys] of ones and zeros.

    Args:
        graph: Graph to convert.
        batch: Index of the sequence.
        head: Index of the head.
        block_size: Tokens per block; divides the numbers of queries and keys.

    Raises:
        ConfigError: If `block_size` does not divide them.
    """
    queries, keys = graph.mask.queries, graph.mask.keys
    if queries % block_size or keys % block_size:
        raise ConfigError(
            f"block_size is {block_size} for {queries} queries and {keys} keys. Expected a divisor of both for BSR."
        )
    rows = torch.cat([part[batch, head] for part in _rows(graph)])
    with _beta():
        return rows.float().to_sparse_bsr((block_size, block_size))


def graph_from_lists(lists: BlockLists, graph: Graph) -> Graph:
    """Graph of all allowed pairs in the blocks of the lists, with the mask of the exported graph."""
    return Graph(graph.heads, graph.mask, edges=lists.blocks(), unit=lists.block_size, query_real=graph.query_real)


@contextmanager
def _beta() -> Generator[None]:
    """Ignore torch's warning that its compressed sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        yield


def _rows(graph: Graph) -> list[Tensor]:
    """Query rows of the graph, some at a time, each [batch heads rows keys]."""
    step = max(ROWS_AT_ONCE // graph.unit, 1) * graph.unit
    return [graph.rows(start, min(start + step, graph.mask.queries)) for start in range(0, graph.mask.queries, step)]


def _some_and_full(graph: Graph, size: int) -> tuple[Tensor, Tensor]:
    """Blocks with a connected pair and blocks without an unconnected one, each [batch heads rows columns]."""
    some: list[Tensor] = []
    full: list[Tensor] = []
    step = math.lcm(size, graph.unit)
    for start in range(0, graph.mask.queries, step):
        edges = graph.rows(start, min(start + step, graph.mask.queries))
        some.append(blocks_of(edges, size))
        # what follows the last token is unconnected, so a partial block is never full
        padded = torch.nn.functional.pad(edges, (0, -edges.shape[3] % size, 0, -edges.shape[2] % size))
        whole = unflatten(padded, 3, (-1, size)).all(4)  # [batch heads rows·size columns]
        full.append(unflatten(whole, 2, (-1, size)).all(3))
    return torch.cat(some, 2), torch.cat(full, 2)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [batch heads rows] and ascending indices [batch heads rows columns] of True; 0 past the counts."""
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.byte().sort(dim=-1, descending=True, stable=True).indices.int()
    place = torch.arange(blocks.shape[-1], device=blocks.device)
    return count, order.masked_fill(place >= count[..., None], 0)


def _flags(count: Tensor, index: Tensor) -> Tensor:
    """Inverse of `_listed` [batch heads rows columns]."""
    place = torch.arange(index.shape[-1], device=index.device)
    valid = place < count[..., None]
    found = torch.zeros((*index.shape[:-1], index.shape[-1] + 1), dtype=torch.bool, device=index.device)
    # entries past the count go to a column of their own, which is cut
    target = index.long().masked_fill(~valid, index.shape[-1])
    return found.scatter_(-1, target, True)[..., : index.shape[-1]]
