"""Attention scores, one tile of batch elements, heads and queries at a time: scaled, biased and masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from graftwork.methods.topk.selection import compute_dtype
from graftwork.surgery.masks import LazyMask

TILE_BUDGET = 1 << 23
"""Attention scores that may exist at once, in numbers; a tile has at least one query and group all the same."""

MINIMUM_CAUSAL_ROWS = 128
"""Queries per tile below which a causal call is not cut further, unless asked for."""


class Rules(NamedTuple):
    """What is done to q·k before selection. Everything that is None is not done."""

    mask: LazyMask | None
    """Padding, causality and patterns, evaluated per tile."""
    allowed: Bool[Tensor, "batch_or_1 heads_or_1 queries_or_1 keys_or_1"] | None
    """True where attention is allowed."""
    bias: Float[Tensor, "batch_or_1 heads_or_1 queries_or_1 keys_or_1"] | None
    """Added to the scaled score; the lowest number of its type, or minus infinity, forbids."""
    relative: Float[Tensor, "heads_or_1 distances"] | None
    """Added likewise; column key − query + queries − 1, so a row of the bias is a window of it."""

    @property
    def forbid(self) -> bool:
        """Whether some key may be forbidden to some query."""
        return self.mask is not None or self.allowed is not None or self.bias is not None

    @property
    def empty(self) -> bool:
        """Whether all keys may be forbidden to some query, which causality alone does not do."""
        mask = self.mask
        if self.allowed is not None or self.bias is not None:
            return True
        return mask is not None and (
            mask.padding is not None or mask.predicate is not None or mask.visible(1) < min(1, mask.keys)
        )


class Sizes(NamedTuple):
    """Extents of one call."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Sizes:
        """Read them off the inputs."""
        return cls(query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2])


class Tile(NamedTuple):
    """A box of batch elements, heads with their groups, and queries."""

    number: int
    batch: slice
    heads: slice
    groups: slice
    rows: slice

    def of_queries(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of batch × heads × queries × … that lies in this tile."""
        return tensor[self.batch, self.heads, self.rows]

    def of_keys(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of batch × groups × … that this tile attends to."""
        return tensor[self.batch, self.groups]

    def by_group(self, tensor: Shaped[Tensor, "batch heads queries width"]) -> Shaped[Tensor, "pairs rows width"]:
        """Put the heads of a group behind one another as more rows, so that keys need not be repeated."""
        pairs = tensor.shape[0] * (self.groups.stop - self.groups.start)
        return tensor.reshape(pairs, tensor.shape[0] * tensor.shape[1] * tensor.shape[2] // pairs, tensor.shape[-1])


def tiles(sizes: Sizes, width: int, chunk_size: int | None, budget: int) -> Iterator[Tile]:
    """Cut a call into tiles of at most `chunk_size` queries and, beyond one query and group, `budget` numbers.

    Args:
        sizes: Extents of the call.
        width: Numbers per head and query.
        chunk_size: Upper bound on the queries of a tile.
        budget: Upper bound on the numbers of a tile.

    Yields:
        Tiles, all those of some queries before the next queries.
    """
    per_query = max(1, sizes.heads // max(1, sizes.groups) * width)
    rows = max(1, min(sizes.queries, chunk_size or sizes.queries, budget // per_query))
    groups = max(1, min(sizes.groups, budget // (per_query * rows)))
    batch = max(1, min(sizes.batch, budget // (per_query * rows * sizes.groups))) if groups == sizes.groups else 1
    repeats = sizes.heads // max(1, sizes.groups)
    number = 0
    for row in range(0, sizes.queries, rows):
        for element in range(0, sizes.batch, batch):
            for group in range(0, sizes.groups, groups):
                last = min(group + groups, sizes.groups)
                yield Tile(
                    number,
                    slice(element, min(element + batch, sizes.batch)),
                    slice(group * repeats, last * repeats),
                    slice(group, last),
                    slice(row, min(row + rows, sizes.queries)),
                )
                number += 1


class Scores:
    """Makes the scores of any tile, in at least single precision."""

    def __init__(self, query: Tensor, key: Tensor, rules: Rules, scale: float) -> None:
        self.query, self.key, self.rules, self.scale = query, key, rules, scale
        self.sizes = Sizes.of(query, key)
        self.dtype = compute_dtype(query.dtype)
        self._buffer: Tensor | None = None
        # masks are the same for all heads, whose tiles come one after another
        self._made: tuple[object, Tensor | None] = (None, None)

    def tiles(self, chunk_size: int | None) -> Iterator[Tile]:
        """Tiles of at most `chunk_size` queries whose scores fit into `TILE_BUDGET`."""
        rows = chunk_size or self.sizes.queries
        if self.rules.mask is not None and self.rules.mask.causal:
            # what causality hides is scored only within a tile; eight rows of tiles score 9/16 of the square
            rows = min(rows, max(MINIMUM_CAUSAL_ROWS, self.sizes.queries // 8))
        return tiles(self.sizes, self.sizes.keys, rows, TILE_BUDGET)

    def visible(self, tile: Tile) -> int:
        """Number of leading keys that some query of the tile can see."""
        mask = self.rules.mask
        return self.sizes.keys if mask is None else mask.visible(tile.rows.stop)

    def scaled_queries(self, tile: Tile) -> Float[Tensor, "pairs rows width"]:
        """Queries of the tile times the scale, which would overflow half precision if it came after the product."""
        return tile.by_group(tile.of_queries(self.query).to(self.dtype) * self.scale)

    def of(self, tile: Tile, width: int) -> Float[Tensor, "batch heads rows keys"]:
        """Scores of the tile against the first `width` keys; minus infinity where attention is not allowed.

        They stay valid until the next call, which reuses their memory.
        """
        keys = tile.of_keys(self.key)[:, :, :width].to(self.dtype).flatten(0, 1)
        queries = self.scaled_queries(tile)
        numbers = queries.shape[0] * queries.shape[1] * width
        if self._buffer is None or self._buffer.numel() < numbers:
            # causal tiles grow, and an allocator that meets a larger one each time keeps all the smaller ones
            self._buffer = queries.new_empty(queries.shape[0] * queries.shape[1] * self.sizes.keys)
        scores = self._buffer[:numbers].view(queries.shape[0], queries.shape[1], width)
        torch.bmm(queries, keys.mT, out=scores)
        batch, heads, rows = (part.stop - part.start for part in (tile.batch, tile.heads, tile.rows))
        scores = scores.view(batch, heads, rows, width)
        if self.rules.relative is not None:
            scores += self._relative(self.rules.relative, tile, width)
        if self.rules.bias is not None:
            bias = box(self.rules.bias, tile, width)
            scores += bias
            scores.masked_fill_(bias <= torch.finfo(bias.dtype).min / 2, -torch.inf)
        if self.rules.allowed is not None:
            scores.masked_fill_(~box(self.rules.allowed, tile, width), -torch.inf)
        if self.rules.mask is not None:
            self._mask(scores, self.rules.mask, tile, width)
        return scores

    def _relative(self, relative: Tensor, tile: Tile, width: int) -> Tensor:
        last = self.sizes.queries - 1
        # later queries start earlier in the table, so the windows come in the opposite order
        part = relative[tile.heads if relative.shape[0] > 1 else slice(None)]
        part = part[:, last - tile.rows.stop + 1 : last - tile.rows.start + width]
        return part.unfold(1, width, 1).flip(1)

    def _mask(self, scores: Tensor, mask: LazyMask, tile: Tile, width: int) -> None:
        start, stop = tile.rows.start, tile.rows.stop
        if mask.predicate is not None:
            if self._made[0] != start:
                self._made = (start, mask.block(start, stop, width, scores.device))
            pattern = self._made[1]
            if pattern is not None:
                scores.masked_fill_(~box(pattern, tile, width, rows=slice(None)), -torch.inf)
            return
        first = mask.visible(start + 1)
        if mask.causal and first < width:
            # only the keys from `first` on are hidden from some of these queries
            shape = (stop - start, width - first)
            shift = start + 1 + mask.query_offset - mask.key_offset - first
            made, hidden = self._made
            if made != (shape, shift) or hidden is None:
                hidden = torch.ones(shape, dtype=torch.bool, device=scores.device).triu_(shift)
                self._made = ((shape, shift), hidden)
            scores[..., first:].masked_fill_(hidden, -torch.inf)
        if mask.padding is not None:
            padding = mask.padding[tile.batch] if mask.padding.shape[0] > 1 else mask.padding
            scores.masked_fill_(~padding[:, None, None, :width].to(scores.device), -torch.inf)


def box(tensor: Tensor, tile: Tile, width: int, rows: slice | None = None) -> Tensor:
    """The part of a broadcastable batch × heads × queries × keys tensor that lies in a tile."""
    wanted = (tile.batch, tile.heads, tile.rows if rows is None else rows, slice(width))
    return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(wanted, tensor.shape, strict=True))]
