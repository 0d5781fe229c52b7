"""Scaled, biased and masked attention scores, computed one tile of batch elements, heads and queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from graftwork.surgery.masks import LazyMask, allowed_by
from graftwork.surgery.precision import compute_dtype

TILE_BUDGET = 1 << 23
"""Maximum number of attention scores of a tile; a tile has at least one query and group even if that exceeds it."""

MINIMUM_CAUSAL_ROWS = 128
"""Queries per tile below which causal calls are split further only by an explicit `chunk_size`."""


class Rules(NamedTuple):
    """Masks and biases of one call, applied to scale·q·k before selection; None for absent ones."""

    mask: LazyMask | None
    """Padding, causality and patterns, evaluated per tile."""
    allowed: Bool[Tensor, "batch_or_1 heads_or_1 queries_or_1 keys_or_1"] | None
    """True where attention is allowed."""
    bias: Float[Tensor, "batch_or_1 heads_or_1 queries_or_1 keys_or_1"] | None
    """Added to the scaled score; numbers up to `MASKED` forbid attention."""
    relative: Float[Tensor, "heads_or_1 distances"] | None
    """Relative bias, added to the scaled score: key j and query i use column j − i + queries − 1, so that each row of
    the full bias is a window of this table."""
    sinks: Float[Tensor, " heads"] | None = None
    """Score per head of a key without a value, which takes part in the softmax and is never selected."""
    starts: Int[Tensor, " batch"] | None = None
    """First real key of each row; None unless the first keys are always kept."""
    shift: int = 0
    """Position of query 0 among the keys: with a cache, the number of cached keys."""

    @property
    def forbid(self) -> bool:
        """True if a key can be masked for a query."""
        return self.mask is not None or self.allowed is not None or self.bias is not None

    @property
    def empty(self) -> bool:
        """True if all keys can be masked for a query; causality alone always leaves one."""
        mask = self.mask
        if self.allowed is not None or self.bias is not None:
            return True
        return mask is not None and (
            mask.padding is not None or mask.predicate is not None or mask.visible(1) < min(1, mask.keys)
        )


class Sizes(NamedTuple):
    """Sizes of one call."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int

    @classmethod
    def of(
        cls, query: Float[Tensor, "batch heads queries width"], key: Float[Tensor, "batch groups keys width"]
    ) -> Sizes:
        """Return the sizes of the given inputs."""
        return cls(query.shape[0], query.shape[1], key.shape[1], query.shape[2], key.shape[2])


class Tile(NamedTuple):
    """Block of batch elements, heads with their groups, and queries."""

    number: int
    batch: slice
    heads: slice
    groups: slice
    rows: slice

    def of_queries(
        self, tensor: Shaped[Tensor, "batch heads queries *rest"]
    ) -> Shaped[Tensor, "tile_batch tile_heads rows *rest"]:
        """Return the view of a per-query tensor in this tile."""
        return tensor[self.batch, self.heads, self.rows]

    def of_keys(self, tensor: Shaped[Tensor, "batch groups *rest"]) -> Shaped[Tensor, "tile_batch tile_groups *rest"]:
        """Return the view of a per-key tensor that this tile attends to."""
        return tensor[self.batch, self.groups]

    def by_group(self, tensor: Shaped[Tensor, "batch heads queries width"]) -> Shaped[Tensor, "pairs rows width"]:
        """Stack the heads of each group as further rows, so that keys need not be repeated.

        Pairs are (batch element, group); rows are (head within the group, query).
        """
        pairs = tensor.shape[0] * (self.groups.stop - self.groups.start)
        # [batch, groups·repeats, queries, width] → [batch·groups, repeats·queries, width]
        return tensor.reshape(pairs, tensor.shape[0] * tensor.shape[1] * tensor.shape[2] // pairs, tensor.shape[-1])


def tiles(sizes: Sizes, width: int, chunk_size: int | None, budget: int) -> Iterator[Tile]:
    """Split a call into tiles of at most `chunk_size` queries and `budget` numbers, but at least one query and group.

    Args:
        sizes: Sizes of the call.
        width: Numbers per head and query.
        chunk_size: Maximum queries of a tile.
        budget: Maximum numbers of a tile.

    Yields:
        Tiles, ordered by queries first.
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
    """Scores z = scale·q·kᵀ + b of one call, tile by tile, in at least float32.

    Args:
        query: Queries [batch heads queries width].
        key: Keys [batch groups keys width].
        rules: Masks and biases.
        scale: Factor on q·k.
        softcap: Bound c of c·tanh(scale·q·k / c), to which scores are mapped before biases; None for no bound.
    """

    def __init__(self, query: Tensor, key: Tensor, rules: Rules, scale: float, softcap: float | None = None) -> None:
        self.query, self.key, self.rules, self.scale, self.softcap = query, key, rules, scale, softcap
        self.sizes = Sizes.of(query, key)
        self.dtype = compute_dtype(query.dtype)
        self._buffer: Tensor | None = None
        # last mask and its key: consecutive tiles are heads of the same queries and share it
        self._made: tuple[object, Tensor | None] = (None, None)

    def tiles(self, chunk_size: int | None) -> Iterator[Tile]:
        """Tiles of at most `chunk_size` queries whose scores fit into `TILE_BUDGET`."""
        rows = chunk_size or self.sizes.queries
        if self.rules.mask is not None and self.rules.mask.causal:
            # masked scores are computed only within a tile; with eight rows of tiles, 9/16 of the square
            rows = min(rows, max(MINIMUM_CAUSAL_ROWS, self.sizes.queries // 8))
        return tiles(self.sizes, self.sizes.keys, rows, TILE_BUDGET)

    def visible(self, tile: Tile) -> int:
        """Number of leading keys that are visible to at least one query of the tile."""
        mask = self.rules.mask
        return self.sizes.keys if mask is None else mask.visible(tile.rows.stop)

    def scaled_queries(self, tile: Tile) -> Float[Tensor, "pairs rows width"]:
        """Queries of the tile times the scale; scaled before the product, which could overflow in half precision."""
        return tile.by_group(tile.of_queries(self.query).to(self.dtype) * self.scale)

    def of(self, tile: Tile, width: int) -> Float[Tensor, "batch heads rows keys"]:
        """Scores of the tile with the first `width` keys; minus infinity where attention is not allowed.

        The result is valid until the next call, which reuses its memory.
        """
        keys = tile.of_keys(self.key)[:, :, :width].to(self.dtype).flatten(0, 1)  # [pairs, keys, head width]
        queries = self.scaled_queries(tile)  # [pairs, repeats·rows, head width]
        numbers = queries.shape[0] * queries.shape[1] * width
        if self._buffer is None or self._buffer.numel() < numbers:
            # full size from the start: causal tiles grow, and a caching allocator would keep every smaller block
            self._buffer = queries.new_empty(queries.shape[0] * queries.shape[1] * self.sizes.keys)
        scores = self._buffer[:numbers].view(queries.shape[0], queries.shape[1], width)  # [pairs, repeats·rows, keys]
        torch.bmm(queries, keys.mT, out=scores)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        batch, heads, rows = (part.stop - part.start for part in (tile.batch, tile.heads, tile.rows))
        scores = scores.view(batch, heads, rows, width)  # [batch, heads, rows, keys]
        if self.rules.relative is not None:
            scores += self._relative(self.rules.relative, tile, width)  # [heads or 1, rows, keys] over the batch
        if self.rules.bias is not None:
            bias = box(self.rules.bias, tile, width)  # broadcasts to [batch, heads, rows, keys]
            scores += bias
            scores.masked_fill_(~allowed_by(bias), -torch.inf)
        if self.rules.allowed is not None:
            scores.masked_fill_(~box(self.rules.allowed, tile, width), -torch.inf)
        if self.rules.mask is not None:
            self._mask(scores, self.rules.mask, tile, width)
        return scores

    def always(self, tile: Tile, width: int, first: int, recent: int) -> Bool[Tensor, "batch_or_1 1 rows keys"]:
        """True for the first keys and the most recent keys of each query, which are kept whatever their score.

        Args:
            tile: The tile.
            width: Number of leading keys.
            first: Number of keys from the first real one on.
            recent: Number of keys up to the query's own position.
        """
        device = self.query.device
        key = torch.arange(width, device=device)  # [keys]
        own = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None] + self.rules.shift  # [rows 1]
        found = ((key <= own) & (key > own - recent))[None, None]  # [1 1 rows keys]
        if self.rules.starts is not None:
            start = self.rules.starts.to(device)[tile.batch, None, None, None]  # [batch 1 1 1]
            found = found | ((key >= start) & (key < start + first))
        return found

    def _relative(self, relative: Tensor, tile: Tile, width: int) -> Tensor:
        """Relative bias of the tile [heads or 1, rows, keys]: row i is columns queries − 1 − i … + width."""
        last = self.sizes.queries - 1
        part = relative[tile.heads if relative.shape[0] > 1 else slice(None)]
        part = part[:, last - tile.rows.stop + 1 : last - tile.rows.start + width]  # [heads or 1, rows + keys − 1]
        # windows start at the last query, hence the flip
        return part.unfold(1, width, 1).flip(1)  # [heads or 1, rows, keys]

    def _mask(self, scores: Tensor, mask: LazyMask, tile: Tile, width: int) -> None:
        """Set the masked scores [batch heads rows keys] of a tile to minus infinity, in place."""
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
            # only keys from `first` on are masked for some of these queries
            shape = (stop - start, width - first)
            shift = start + 1 + mask.query_offset - mask.key_offset - first
            made, hidden = self._made
            if made != (shape, shift) or hidden is None:
                hidden = torch.ones(shape, dtype=torch.bool, device=scores.device).triu_(shift)  # [rows, keys − first]
                self._made = ((shape, shift), hidden)
            scores[..., first:].masked_fill_(hidden, -torch.inf)
        if mask.padding is not None:
            padding = mask.padding[tile.batch] if mask.padding.shape[0] > 1 else mask.padding
            scores.masked_fill_(~padding[:, None, None, :width].to(scores.device), -torch.inf)  # [batch, 1, 1, keys]


def box(
    tensor: Shaped[Tensor, "batch_or_1 heads_or_1 queries_or_1 keys_or_1"],
    tile: Tile,
    width: int,
    rows: slice | None = None,
) -> Shaped[Tensor, "tile_batch_or_1 tile_heads_or_1 rows_or_1 width_or_1"]:
    """Return the view of a tensor, broadcastable to [batch heads queries keys], in a tile.

    Args:
        tensor: Mask or bias.
        tile: The tile.
        width: Number of leading keys.
        rows: Queries, if `tensor` does not cover all of them; default the rows of the tile.
    """
    wanted = (tile.batch, tile.heads, tile.rows if rows is None else rows, slice(width))
    return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(wanted, tensor.shape, strict=True))]
