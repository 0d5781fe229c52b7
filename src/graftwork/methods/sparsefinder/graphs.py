"""Attention graphs: connected pairs of queries and keys as shared buckets, edges and fixed patterns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.sparsefinder.tensors import unflatten
from graftwork.surgery.masks import LazyMask, PositionBias
from graftwork.surgery.precision import attention_scores

SOFTMAX_MASS = 0.95
"""Share of the probability mass of a softmax row that its gold pairs have at least."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Fixed edges, independent of the content of the tokens: a band and global tokens."""

    window: int | None = None
    """Width w of the band: −(⌈w/2⌉−1) ≤ key − query ≤ ⌊w/2⌋."""
    first: bool = False
    """True to connect token 0 with all tokens."""
    last: bool = False
    """True to connect the last non-padding token with all tokens."""

    def __bool__(self) -> bool:
        return bool(self.window) or self.first or self.last

    def edges(
        self,
        query: Int[Tensor, "... queries 1"],
        key: Int[Tensor, "... 1 keys"],
        last_query: Tensor | int,
        last_key: Tensor | int,
    ) -> Bool[Tensor, "... queries keys"]:
        """True for position pairs that the pattern connects; `last_query` and `last_key` broadcast [... 1 1]."""
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
        self,
        query: tuple[Tensor, Tensor],
        key: tuple[Tensor, Tensor],
        last_query: Int[Tensor, "batch 1 1"],
        last_key: Int[Tensor, "batch 1 1"],
    ) -> Bool[Tensor, "... queries keys"]:
        """True for range pairs with at least one connected pair; a range is (lowest, highest) position."""
        found = torch.zeros((), dtype=torch.bool, device=query[0].device)
        if self.window:
            # the differences of two ranges form a range
            nearest, farthest = key[0] - query[1], key[1] - query[0]
            found = (farthest >= 1 - (self.window + 1) // 2) & (nearest <= self.window // 2)
        if self.first:
            found = found | _holds(query, 0) | _holds(key, 0)
        if self.last:
            found = found | _holds(query, last_query) | _holds(key, last_key)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Connected pairs of a batch of heads, without a tensor of queries × keys unless `edges` is one.

    graph = (shared bucket ∪ edges ∪ pattern) ∩ mask. Buckets and edges can refer to blocks of `unit` tokens.
    """

    heads: int
    mask: LazyMask
    """Padding, causality and any other mask rule."""
    query_buckets: Bool[Tensor, "batch heads query_units buckets"] | None = None
    key_buckets: Bool[Tensor, "batch heads key_units buckets"] | None = None
    edges: Bool[Tensor, "batch heads query_units key_units"] | None = None
    pattern: Pattern = Pattern()
    unit: int = 1
    """Tokens per row and column of buckets, edges and pattern."""
    query_real: Bool[Tensor, "batch queries"] | None = None
    """True for non-padding queries; rows of padding are empty. None if no query is padding."""
    key_unit: int | None = None
    """Tokens per column of `edges`, if it differs from `unit`, which is 1 then."""

    def gathered_size(self, size: int) -> int:
        """Tokens per gathered block: `size`, raised to fit the blocks of the graph."""
        unit = self.unit if self.key_unit is None or self.unit > 1 else self.key_unit
        if self.unit == 1 and unit % size == 0:
            return size
        return -(-size // unit) * unit

    @property
    def lengths(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Position after the last non-padding query and key of each sequence."""
        keys = _ends(self.mask.padding, self.mask.batch, self.mask.keys) + self.mask.key_offset
        if self.mask.queries == self.mask.keys and self.query_real is None:
            return keys, keys
        return _ends(self.query_real, self.mask.batch, self.mask.queries) + self.mask.query_offset, keys

    def dense(self, device: torch.device | str | None = None) -> Bool[Tensor, "batch heads queries keys"]:
        """Build the whole graph as one tensor."""
        return self.rows(0, self.mask.queries, device)

    def rows(
        self, start: int, stop: int, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch heads rows keys"]:
        """Build query rows start…stop of the graph."""
        units = slice(start // self.unit, -(-stop // self.unit))
        device = device or self._device()
        found = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
        if self.query_buckets is not None and self.key_buckets is not None:
            found = share_bucket(self.query_buckets[:, :, units], self.key_buckets)  # [batch heads units key_units]
        if self.edges is not None:
            found = found | self._edge_rows(units)
        if self.unit > 1 and found.shape[-1] > 1:
            # [batch heads units key_units] → [batch heads rows keys]
            found = unfold(found, self.unit)[:, :, start % self.unit :, : self.mask.keys][:, :, : stop - start]
        if self.pattern:
            found = found | self.pattern_rows(start, stop, device)
        found = found.expand(self.mask.batch, self.heads, stop - start, self.mask.keys)
        allowed = self.mask.block(start, stop, device=device)
        if allowed is not None:
            found = found & allowed
        if self.query_real is not None:
            found = found & self.query_real[:, None, start:stop, None]  # [batch 1 rows 1]
        return found

    def coarse(self, size: int, device: torch.device | str | None = None) -> Bool[Tensor, "batch heads rows columns"]:
        """Block graph: True for blocks of `size` queries and keys that can contain an edge.

        Buckets are pooled per block, so no tensor of queries × keys is allocated. The result is an upper bound: a block
        whose pairs are all masked individually can be included.
        """
        device = device or self._device()
        shape = (-(-self.mask.queries // size), -(-self.mask.keys // size))
        found = torch.zeros((1, 1, *shape), dtype=torch.bool, device=device)
        if self.query_buckets is not None and self.key_buckets is not None:
            found = found | share_bucket(self._pooled(self.query_buckets, size), self._pooled(self.key_buckets, size))
        if self.edges is not None:
            found = found | self._coarse_edges(size, shape, device)
        if self.pattern:
            found = found | self.coarse_pattern(size, shape, device)
        found = found.expand(self.mask.batch, self.heads, *shape)
        return found & self._coarse_mask(size, shape, device)

    def starts(self) -> Int[Tensor, " batch"]:
        """Position of the first non-padding key of each sequence; above 0 under left padding."""
        return torch.zeros(self.mask.batch, dtype=torch.long) if self.unit > 1 else self.mask.starts()

    def pattern_rows(self, start: int, stop: int, device: torch.device | str) -> Bool[Tensor, "batch 1 rows keys"]:
        """Build query rows start…stop of the fixed pattern, before the mask."""
        query, key = self._positions(start, stop, device)
        first = self.starts().to(device).view(-1, 1, 1)  # [batch 1 1]
        last_query, last_key = (((ends.to(device)).view(-1, 1, 1) - 1 - first) // self.unit for ends in self.lengths)
        found = self.pattern.edges(query, key, last_query, last_key)  # [batch rows keys]
        return found.unsqueeze(1)

    def coarse_pattern(
        self, size: int, shape: tuple[int, int], device: torch.device | str
    ) -> Bool[Tensor, "batch 1 rows columns"]:
        """Build the fixed pattern between blocks of `size` tokens from the first and last position of each block."""
        first = self.starts().to(device).view(-1, 1, 1)  # [batch 1 1]

        def ends(count: int, blocks: int, offset: int) -> tuple[Tensor, Tensor]:
            low = torch.arange(blocks, device=device) * size  # [blocks]
            high = (low + size).clamp_max(count) - 1
            return (low + offset - first) // self.unit, (high + offset - first) // self.unit  # [batch 1 blocks]

        query = ends(self.mask.queries, shape[0], self.mask.query_offset)
        key = ends(self.mask.keys, shape[1], self.mask.key_offset)
        last_query, last_key = ((end.to(device).view(-1, 1, 1) - 1 - first) // self.unit for end in self.lengths)
        # queries [batch rows 1] against keys [batch 1 columns]
        found = self.pattern.between((query[0].mT, query[1].mT), key, last_query, last_key)
        return found.unsqueeze(1)

    def _device(self) -> torch.device:
        for tensor in (self.query_buckets, self.edges, self.mask.padding):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")

    def _positions(self, start: int, stop: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Positions of query rows [batch rows 1] and of all keys [batch 1 keys], in units from the first token."""
        first = self.starts().to(device).view(-1, 1, 1)  # [batch 1 1]
        query = torch.arange(start, stop, device=device) + self.mask.query_offset
        key = torch.arange(self.mask.keys, device=device) + self.mask.key_offset
        return (query[:, None] - first) // self.unit, (key[None, :] - first) // self.unit

    def _pooled(self, buckets: Tensor, size: int) -> Tensor:
        """Buckets of blocks as the union over their tokens [batch heads blocks buckets]."""
        group = size // self.unit
        if group == 1:
            return buckets
        missing = -buckets.shape[2] % group
        padded = F.pad(buckets, (0, 0, 0, missing))
        return unflatten(padded, 2, (-1, group)).any(3)  # [batch heads blocks group buckets] → any over group

    def _edge_rows(self, units: slice) -> Tensor:
        """Edges of some rows, with the columns of `unit` tokens [batch heads rows columns]."""
        edges = self.edges
        if edges is None:
            return torch.zeros((1, 1, 1, 1), dtype=torch.bool)
        edges = edges[:, :, units]
        if self.key_unit is None or self.key_unit == self.unit:
            return edges
        # [batch heads rows key_units] → [batch heads rows keys]
        return edges.repeat_interleave(self.key_unit, -1)[..., : self.mask.keys]

    def _coarse_edges(self, size: int, shape: tuple[int, int], device: torch.device | str) -> Tensor:
        """Edges between blocks [batch heads rows columns]."""
        edges, group = self.edges, size // self.unit
        if edges is None:
            return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
        key_unit = self.key_unit or self.unit
        if size % key_unit == 0:
            wide = size // key_unit
            padded = F.pad(edges, (0, shape[1] * wide - edges.shape[3]))
            columns = unflatten(padded, 3, (-1, wide)).any(4)  # [batch heads units columns]
        elif key_unit % size == 0:
            columns = edges.repeat_interleave(key_unit // size, -1)[..., : shape[1]]
        else:
            tokens = edges.repeat_interleave(key_unit, -1)[..., : self.mask.keys]
            columns = unflatten(F.pad(tokens, (0, -tokens.shape[3] % size)), 3, (-1, size)).any(4)
        columns = F.pad(columns, (0, 0, 0, shape[0] * group - columns.shape[2]))
        return unflatten(columns, 2, (-1, group)).any(3)  # [batch heads rows columns]

    def allowed_blocks(self, size: int) -> Bool[Tensor, "batch 1 rows columns"]:
        """Blocks of `size` queries and keys that causality and padding allow at least in part."""
        shape = (-(-self.mask.queries // size), -(-self.mask.keys // size))
        return self._coarse_mask(size, shape, self._device())

    def _coarse_mask(self, size: int, shape: tuple[int, int], device: torch.device | str) -> Tensor:
        """Blocks that causality and padding allow in part [batch 1 rows columns]."""
        possible = torch.ones((1, 1, *shape), dtype=torch.bool, device=device)
        if self.mask.causal:
            last_query = torch.arange(1, shape[0] + 1, device=device) * size - 1 + self.mask.query_offset
            first_key = torch.arange(shape[1], device=device) * size + self.mask.key_offset
            possible = possible & (first_key[None, :] <= last_query[:, None])  # [1 columns] ≤ [rows 1]
        for real, dim, count in ((self.mask.padding, 2, shape[1]), (self.query_real, 3, shape[0])):
            if real is not None:
                padded = F.pad(real.to(device), (0, count * size - real.shape[1]))
                blocks = unflatten(padded, 1, (-1, size)).any(2)  # [batch blocks]
                # keys [batch 1 1 blocks], queries [batch 1 blocks 1]
                possible = possible & blocks[:, None].unsqueeze(dim)
        return possible


def share_bucket(
    query: Bool[Tensor, "batch heads queries buckets"], key: Bool[Tensor, "batch heads keys buckets"]
) -> Bool[Tensor, "batch heads queries keys"]:
    """True for pairs whose bucket sets intersect: q · kᵀ > 0 on the flags."""
    return (query.float() @ key.float().mT) > 0


def unfold(edges: Bool[Tensor, "... rows columns"], unit: int) -> Bool[Tensor, "... queries keys"]:
    """Repeat every entry of a block graph unit × unit times."""
    return edges.repeat_interleave(unit, -2).repeat_interleave(unit, -1)  # [… rows·unit columns·unit]


def blocks_of(edges: Bool[Tensor, "... queries keys"], unit: int) -> Bool[Tensor, "... rows columns"]:
    """Block graph of a token graph: True for blocks with at least one connected pair."""
    padded = F.pad(edges, (0, -edges.shape[-1] % unit, 0, -edges.shape[-2] % unit))
    columns = unflatten(padded, -1, (-1, unit)).any(-1)  # [… queries columns]
    return unflatten(columns, -2, (-1, unit)).any(-2)  # [… rows unit columns] → [… rows columns]


def block_vectors(
    projected: Float[Tensor, "batch heads tokens width"], real: Bool[Tensor, "batch tokens"], unit: int
) -> tuple[Float[Tensor, "batch heads blocks joined"], Bool[Tensor, "batch blocks"]]:
    """Concatenate the vectors of `unit` consecutive tokens, joined = unit · width; padding counts as zeros.

    Returns:
        The concatenated vectors, and True for blocks with a non-padding token.
    """
    clean = projected.masked_fill(~real[:, None, :, None], 0.0)  # [batch 1 tokens 1]
    missing = -projected.shape[2] % unit
    padded = F.pad(clean, (0, 0, 0, missing))
    joined = unflatten(padded, 2, (-1, unit)).flatten(3)  # [batch heads blocks unit width] → [… blocks unit·width]
    return joined, unflatten(F.pad(real, (0, missing)), 1, (-1, unit)).any(2)


def gold_edges(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    mask: LazyMask,
    *,
    scale: float | Float[Tensor, " heads"],
    alpha: float | Tensor = 1.5,
    bias: PositionBias | Tensor | None = None,
    query_real: Bool[Tensor, "batch queries"] | None = None,
) -> Bool[Tensor, "batch heads queries keys"]:
    """Gold graph: True for pairs with entmax_α(scale · q·k + bias) > 0; rows of padded queries are empty.

    Args:
        query: Queries of every head.
        key: Keys of every head, or of groups of heads.
        mask: Padding and causality.
        scale: Factor on query·key.
        alpha: α of entmax; a scalar, or a tensor [heads 1 1].
        bias: Term added to the scores; a tensor [batch heads queries keys] or a relative position bias.
        query_real: True for non-padding queries; None if no query is padding.
    """
    from graftwork.methods.sparsefinder.entmax import entmax, support15

    scores = attention_scores(query, key, scale, centred=True)
    whole = bias.block(0, query.shape[2], key.shape[2]) if isinstance(bias, PositionBias) else bias
    scores = scores if whole is None else scores + whole  # [batch heads queries keys]
    allowed = mask.block(0, mask.queries, device=query.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    edges = entmax(scores, alpha) > 0 if isinstance(alpha, Tensor) or alpha != 1.5 else support15(scores)
    return edges if query_real is None else edges & query_real[:, None, :, None]  # [batch 1 queries 1]


def gold_pairs(
    weights: Float[Tensor, "*rows keys"], *, softmax: bool, share: float = SOFTMAX_MASS
) -> Bool[Tensor, "*rows keys"]:
    """Gold pairs of attention probabilities: the positive ones, or, of softmax, the smallest set with most of the mass.

    Args:
        weights: Attention probabilities; a row of zeros has no gold pair.
        softmax: True for softmax, whose probabilities are all positive.
        share: Share of the mass of a softmax row that its gold pairs have at least.
    """
    if not softmax:
        return weights > 0
    ordered = weights.sort(dim=-1, descending=True)
    # a pair belongs to the set if the larger ones alone have less than the share
    before = ordered.values.cumsum(-1) - ordered.values  # [*rows keys]
    chosen = (before < share) & (ordered.values > 0)
    return torch.zeros_like(chosen).scatter_(-1, ordered.indices, chosen)


def _holds(positions: tuple[Tensor, Tensor], place: Tensor | int) -> Tensor:
    """True for ranges that contain a position."""
    return (positions[0] <= place) & (place <= positions[1])


def _ends(real: Tensor | None, batch: int, length: int) -> Tensor:
    """Position after the last True of each row [batch]."""
    if real is None:
        return torch.full((batch,), length)
    position = torch.arange(1, real.shape[1] + 1, device=real.device)  # [length]
    return (real * position).amax(1)
