"""Attention graphs: which query and key are connected, as shared buckets, edges and fixed patterns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.surgery.masks import LazyMask, PositionBias

ROWS_AT_ONCE = 1024
"""Query rows whose edges are looked at together where a whole graph must not exist."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Edges that are there whatever the tokens are."""

    window: int | None = None
    """Width of the band: −(⌈w/2⌉−1) ≤ key − query ≤ ⌊w/2⌋."""
    first: bool = False
    """Token 0 is connected with all."""
    last: bool = False
    """The last real token is connected with all."""

    def __bool__(self) -> bool:
        return bool(self.window) or self.first or self.last

    def edges(self, query: Tensor, key: Tensor, last_query: Tensor | int, last_key: Tensor | int) -> Tensor:
        """Whether the pattern connects positions, which broadcast."""
        found = torch.zeros((), dtype=torch.bool, device=query.device)
        if self.window:
            distance = key - query
            found = (distance >= 1 - (self.window + 1) // 2) & (distance <= self.window // 2)
        if self.first:
            found = found | (query == 0) | (key == 0)
        if self.last:
            found = found | (query == last_query) | (key == last_key)
        return found

    def between(
        self, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], last_query: Tensor, last_key: Tensor
    ) -> Tensor:
        """Whether the pattern connects any position of one range with any of another; ranges are (lowest, highest)."""
        found = torch.zeros((), dtype=torch.bool, device=query[0].device)
        if self.window:
            # the distances between two ranges are a range themselves
            nearest, farthest = key[0] - query[1], key[1] - query[0]
            found = (farthest >= 1 - (self.window + 1) // 2) & (nearest <= self.window // 2)
        if self.first:
            found = found | _holds(query, 0) | _holds(key, 0)
        if self.last:
            found = found | _holds(query, last_query) | _holds(key, last_key)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """The connected pairs of a batch of heads, without a tensor of queries × keys unless `edges` is one.

    A pair is in the graph if it shares a bucket, or is an edge, or lies in the pattern; and the mask allows it. Buckets
    and edges may be those of blocks of `unit` tokens.
    """

    heads: int
    mask: LazyMask
    """Padding, causality and whatever else forbids pairs."""
    query_buckets: Bool[Tensor, "batch heads query_units buckets"] | None = None
    key_buckets: Bool[Tensor, "batch heads key_units buckets"] | None = None
    edges: Bool[Tensor, "batch heads query_units key_units"] | None = None
    pattern: Pattern = Pattern()
    unit: int = 1
    """Tokens per row and column of buckets and edges; the pattern is in units as well."""
    query_real: Bool[Tensor, "batch queries"] | None = None
    """True for queries that count; the rows of others are empty. None if all do."""

    @property
    def lengths(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Position after the last real query and key of each sequence."""
        keys = _ends(self.mask.padding, self.mask.batch, self.mask.keys) + self.mask.key_offset
        if self.mask.queries == self.mask.keys and self.query_real is None:
            return keys, keys
        return _ends(self.query_real, self.mask.batch, self.mask.queries) + self.mask.query_offset, keys

    def dense(self, device: torch.device | str | None = None) -> Bool[Tensor, "batch heads queries keys"]:
        """The whole graph as one tensor."""
        return self.rows(0, self.mask.queries, device)

    def rows(
        self, start: int, stop: int, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch heads rows keys"]:
        """Query rows start…stop of the graph."""
        units = slice(start // self.unit, -(-stop // self.unit))
        device = device or self._device()
        found = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
        if self.query_buckets is not None and self.key_buckets is not None:
            found = share_bucket(self.query_buckets[:, :, units], self.key_buckets)
        if self.edges is not None:
            found = found | self.edges[:, :, units]
        if self.unit > 1 and found.shape[-1] > 1:
            found = unfold(found, self.unit)[:, :, start % self.unit :, : self.mask.keys][:, :, : stop - start]
        if self.pattern:
            found = found | self._pattern_rows(start, stop, device)
        found = found.expand(self.mask.batch, self.heads, stop - start, self.mask.keys)
        allowed = self.mask.block(start, stop, device=device)
        if allowed is not None:
            found = found & allowed
        if self.query_real is not None:
            found = found & self.query_real[:, None, start:stop, None]
        return found

    def coarse(self, size: int, device: torch.device | str | None = None) -> Bool[Tensor, "batch heads rows columns"]:
        """Which blocks of `size` queries and keys hold an edge, or may hold one where only buckets tell.

        Buckets are pooled per block, so no tensor of queries × keys exists; a block whose pairs turn out to be
        forbidden one by one may be among the answers.
        """
        device = device or self._device()
        shape = (-(-self.mask.queries // size), -(-self.mask.keys // size))
        found = torch.zeros((1, 1, *shape), dtype=torch.bool, device=device)
        if self.query_buckets is not None and self.key_buckets is not None:
            found = found | share_bucket(self._pooled(self.query_buckets, size), self._pooled(self.key_buckets, size))
        if self.edges is not None:
            found = found | self._coarse_edges(size, shape, device)
        if self.pattern:
            found = found | self._coarse_pattern(size, shape, device)
        found = found.expand(self.mask.batch, self.heads, *shape)
        return found & self._coarse_mask(size, shape, device)

    def with_mask(self, mask: LazyMask) -> Graph:
        """The same predictions under another mask."""
        return replace(self, mask=mask)

    def _device(self) -> torch.device:
        for tensor in (self.query_buckets, self.edges, self.mask.padding):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")

    def _positions(self, start: int, stop: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Positions of query rows and of all keys, counted from the first real token and in units."""
        first = self.starts().to(device).view(-1, 1, 1)
        query = torch.arange(start, stop, device=device) + self.mask.query_offset
        key = torch.arange(self.mask.keys, device=device) + self.mask.key_offset
        return (query[:, None] - first) // self.unit, (key[None, :] - first) // self.unit

    def _pattern_rows(self, start: int, stop: int, device: torch.device | str) -> Tensor:
        query, key = self._positions(start, stop, device)
        first = self.starts().to(device).view(-1, 1, 1)
        last_query, last_key = (((ends.to(device)).view(-1, 1, 1) - 1 - first) // self.unit for ends in self.lengths)
        found = self.pattern.edges(query, key, last_query, last_key)
        return found.unsqueeze(1)

    def starts(self) -> Int[Tensor, " batch"]:
        """Position of the first real key of each sequence, which is not 0 where padding stands on the left."""
        return torch.zeros(self.mask.batch, dtype=torch.long) if self.unit > 1 else self.mask.starts()

    def _pooled(self, buckets: Tensor, size: int) -> Tensor:
        """Buckets of blocks: all those of their tokens."""
        group = size // self.unit
        if group == 1:
            return buckets
        missing = -buckets.shape[2] % group
        return F.pad(buckets, (0, 0, 0, missing)).unflatten(2, (-1, group)).any(3)

    def _coarse_edges(self, size: int, shape: tuple[int, int], device: torch.device | str) -> Tensor:
        edges, group = self.edges, size // self.unit
        if edges is None:
            return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
        padded = F.pad(edges, (0, shape[1] * group - edges.shape[3], 0, shape[0] * group - edges.shape[2]))
        return padded.unflatten(3, (-1, group)).any(4).unflatten(2, (-1, group)).any(3)

    def _coarse_pattern(self, size: int, shape: tuple[int, int], device: torch.device | str) -> Tensor:
        """Pattern of blocks [batch 1 rows columns], from the first and last position of each."""
        first = self.starts().to(device).view(-1, 1, 1)

        def ends(count: int, blocks: int, offset: int) -> tuple[Tensor, Tensor]:
            low = torch.arange(blocks, device=device) * size
            high = (low + size).clamp_max(count) - 1
            return (low + offset - first) // self.unit, (high + offset - first) // self.unit

        query = ends(self.mask.queries, shape[0], self.mask.query_offset)
        key = ends(self.mask.keys, shape[1], self.mask.key_offset)
        last_query, last_key = ((end.to(device).view(-1, 1, 1) - 1 - first) // self.unit for end in self.lengths)
        found = self.pattern.between((query[0].mT, query[1].mT), key, last_query, last_key)
        return found.unsqueeze(1)

    def _coarse_mask(self, size: int, shape: tuple[int, int], device: torch.device | str) -> Tensor:
        possible = torch.ones((1, 1, *shape), dtype=torch.bool, device=device)
        if self.mask.causal:
            last_query = torch.arange(1, shape[0] + 1, device=device) * size - 1 + self.mask.query_offset
            first_key = torch.arange(shape[1], device=device) * size + self.mask.key_offset
            possible = possible & (first_key[None, :] <= last_query[:, None])
        for real, dim, count in ((self.mask.padding, 2, shape[1]), (self.query_real, 3, shape[0])):
            if real is not None:
                padded = F.pad(real.to(device), (0, count * size - real.shape[1]))
                possible = possible & padded.unflatten(1, (-1, size)).any(2)[:, None].unsqueeze(dim)
        return possible


def share_bucket(
    query: Bool[Tensor, "batch heads queries buckets"], key: Bool[Tensor, "batch heads keys buckets"]
) -> Bool[Tensor, "batch heads queries keys"]:
    """Whether the bucket sets of a query and a key intersect."""
    return (query.float() @ key.float().mT) > 0


def unfold(edges: Bool[Tensor, "... rows columns"], unit: int) -> Bool[Tensor, "... queries keys"]:
    """Repeat every entry of a block graph unit × unit times."""
    return edges.repeat_interleave(unit, -2).repeat_interleave(unit, -1)


def blocks_of(edges: Bool[Tensor, "... queries keys"], unit: int) -> Bool[Tensor, "... rows columns"]:
    """The block graph of a token graph: a block edge where any pair inside is connected."""
    padded = F.pad(edges, (0, -edges.shape[-1] % unit, 0, -edges.shape[-2] % unit))
    return padded.unflatten(-1, (-1, unit)).any(-1).unflatten(-2, (-1, unit)).any(-2)


def block_vectors(
    projected: Float[Tensor, "batch heads tokens width"], real: Bool[Tensor, "batch tokens"], unit: int
) -> tuple[Float[Tensor, "batch heads blocks joined"], Bool[Tensor, "batch blocks"]]:
    """Vectors of `unit` tokens in a row, joined; padding counts as zeros.

    Returns:
        The joined vectors, and which blocks hold a real token.
    """
    clean = projected.masked_fill(~real[:, None, :, None], 0.0)
    missing = -projected.shape[2] % unit
    joined = F.pad(clean, (0, 0, 0, missing)).unflatten(2, (-1, unit)).flatten(3)
    return joined, F.pad(real, (0, missing)).unflatten(1, (-1, unit)).any(2)


def gold_edges(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    mask: LazyMask,
    *,
    scale: float,
    alpha: float | Tensor = 1.5,
    bias: PositionBias | Tensor | None = None,
    query_real: Bool[Tensor, "batch queries"] | None = None,
) -> Bool[Tensor, "batch heads queries keys"]:
    """The pairs to which entmax gives a probability above zero; rows of padded queries are empty.

    Args:
        query: Queries of every head.
        key: Keys of every head, or of groups of heads.
        mask: Padding and causality.
        scale: Factor of the scores.
        alpha: α of entmax; one for all, or a tensor that broadcasts against the scores.
        bias: Added to the scores.
        query_real: Real queries; None takes all.
    """
    from graftwork.methods.sparsefinder.entmax import entmax, support15

    scores = (query * scale) @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    whole = bias.block(0, query.shape[2], key.shape[2]) if isinstance(bias, PositionBias) else bias
    scores = scores if whole is None else scores + whole
    allowed = mask.block(0, mask.queries, device=query.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    edges = entmax(scores, alpha) > 0 if isinstance(alpha, Tensor) or alpha != 1.5 else support15(scores)
    return edges if query_real is None else edges & query_real[:, None, :, None]


def _holds(positions: tuple[Tensor, Tensor], place: Tensor | int) -> Tensor:
    return (positions[0] <= place) & (place <= positions[1])


def _ends(real: Tensor | None, batch: int, length: int) -> Tensor:
    if real is None:
        return torch.full((batch,), length)
    position = torch.arange(1, real.shape[1] + 1, device=real.device)
    return (real * position).amax(1)
