"""Graphs of key blocks within a budget: the own block, the band and global tokens, then the best by an estimator.

In decoders and in cross-attention every query chooses for itself, from complete past blocks and its own, so that no
row depends on a later token and cached generation equals the uncached pass. In encoders a block of queries chooses
together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.block_scores import (
    PooledKeys,
    gate_scores,
    mean_scores,
    page_scores,
    pool_keys,
    pool_queries,
)
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.graphs import Graph, Pattern
from graftwork.surgery.masks import LazyMask


@dataclass(frozen=True, slots=True)
class Gate:
    """Projections of the learned gate."""

    query: Callable[[Tensor], Tensor]
    """Projection of queries [batch heads queries width] to rounds."""
    key: Callable[[Tensor], Tensor]
    """Projection of pooled keys [batch heads blocks 3·width] to rounds."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """Rows of a block graph: what every row may choose, and what it always keeps."""

    allowed: Bool[Tensor, "batch 1 rows blocks"]
    forced: Bool[Tensor, "batch 1 rows blocks"]


def predict_blocks(
    config: SparsefinderConfig,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    mask: LazyMask,
    *,
    gate: Gate | None,
    cross: bool,
    query_real: Bool[Tensor, "batch queries"] | None,
) -> Graph:
    """Choose key blocks for every query, or for every block of queries in encoders, within the budget.

    Args:
        config: Grouping, block size, budget, band and global tokens.
        query: Queries, not projected.
        key: Keys, not projected.
        mask: Padding, causality and offsets.
        gate: Projections of grouping gate.
        cross: True if keys belong to another sequence.
        query_real: True for non-padding queries; None if no query is padding.

    Raises:
        ConfigError: If a rolling cache has dropped keys, or grouping gate has no projections.
    """
    if mask.key_offset:
        raise ConfigError(
            f"Found a rolling cache, which drops keys of past blocks, with grouping {config.grouping}. Expected all "
            "past keys. Choose a full cache, or grouping distance or window."
        )
    unit, heads = config.block_size, query.shape[1]
    start = mask.starts().to(query.device)  # [batch]
    shifted = start if bool((start > 0).any()) else None
    real_key = _real(mask.padding, mask.batch, mask.keys, query.device)
    pooled = pool_keys(key, real_key, unit, shifted)
    per_token = mask.causal or cross
    rows = query if per_token else _pooled_queries(query, real_key if query_real is None else query_real, unit, shifted)
    scores = block_estimates(config, rows, pooled, gate)  # [batch heads rows blocks]
    limits = block_rows(config, mask, pooled.real, scores.shape[2], start, cross=cross)
    flags = choose_blocks(scores, limits, config.block_budget)
    # in decoders the forced blocks contain every edge of the pattern
    fixed = not mask.causal and (not cross or config.cross_patterns)
    # a pattern counts in units of the graph; the blocks of the band are forced
    window = config.window_size if per_token or shifted is not None else None
    pattern = Pattern(window, config.add_cls_mask, config.add_last_mask) if fixed else Pattern()
    if shifted is None:
        return Graph(
            heads,
            mask,
            edges=flags,
            pattern=pattern,
            unit=1 if per_token else unit,
            query_real=query_real,
            key_unit=unit,
        )
    # blocks that start within a physical block are buckets: one per block
    place = torch.arange(mask.keys, device=query.device) - start[:, None]  # [batch keys]
    block = torch.div(place, unit, rounding_mode="floor")
    member = F.one_hot(block.clamp_min(0), flags.shape[-1]).bool() & (block >= 0)[..., None]  # [batch keys blocks]
    if not per_token:
        own = block.clamp_min(0)[:, None, :, None].expand(-1, heads, -1, flags.shape[-1])
        flags = flags.gather(2, own)  # [batch heads blocks blocks] → [batch heads queries blocks]
    return Graph(heads, mask, flags, member[:, None], pattern=pattern, query_real=query_real)


def block_estimates(
    config: SparsefinderConfig,
    rows: Float[Tensor, "batch heads rows width"],
    pooled: PooledKeys,
    gate: Gate | None,
) -> Float[Tensor, "batch heads rows blocks"]:
    """Estimated attention of every row to every block.

    Args:
        config: Grouping.
        rows: Queries, or mean queries of blocks.
        pooled: Pooled keys.
        gate: Projections of grouping gate.
    """
    if config.grouping == "mean_pooled":
        return mean_scores(rows, pooled)
    if config.grouping == "pages":
        return page_scores(rows, pooled)
    if gate is None:
        raise ConfigError("Found no projections for grouping gate. Train first, or choose mean_pooled or pages.")
    joined = pooled.joined
    # [batch groups blocks joined] → [batch heads blocks joined]
    joined = joined.repeat_interleave(rows.shape[1] // joined.shape[1], 1)
    return gate_scores(gate.query(rows), gate.key(joined))


def block_rows(
    config: SparsefinderConfig,
    mask: LazyMask,
    real: Bool[Tensor, "batch blocks"],
    rows: int,
    start: Int[Tensor, " batch"],
    *,
    cross: bool,
) -> BlockRows:
    """Blocks that every row may choose and blocks that it always keeps.

    Args:
        config: Band and global tokens.
        mask: Causality and offsets.
        real: True for blocks with a non-padding key.
        rows: Number of rows: queries, or blocks of queries in encoders.
        start: Position of the first token of each sequence.
        cross: True if keys belong to another sequence.
    """
    unit, device = config.block_size, real.device
    block = torch.arange(real.shape[1], device=device)
    index = torch.arange(rows, device=device)
    if mask.causal or cross:
        first = index[None] + mask.query_offset - (0 if cross else start[:, None])  # [batch or 1, rows]
        last = first
    else:
        first, last = index[None] * unit, index[None] * unit + unit - 1
    allowed = real[:, None, :].expand(-1, rows, -1)  # [batch rows blocks]
    forced = torch.zeros((1, 1, 1), dtype=torch.bool, device=device)
    own = torch.div(last, unit, rounding_mode="floor")[..., None]  # [batch or 1, rows, 1]
    if mask.causal:
        allowed = allowed & (block <= own)
        forced = forced | (block == own)
    if not cross or config.cross_patterns:
        if config.window_size:
            before, after = (config.window_size + 1) // 2 - 1, config.window_size // 2
            low = torch.div(first - before, unit, rounding_mode="floor")[..., None]
            high = torch.div(last + after, unit, rounding_mode="floor")[..., None]
            forced = forced | ((block >= low) & (block <= high))
        if config.add_cls_mask:
            forced = forced | (block == 0)
        if config.add_last_mask:
            forced = forced | (block == (real * (block + 1)).amax(1)[:, None, None] - 1)
    return BlockRows(allowed[:, None], (forced & allowed)[:, None])


def choose_blocks(
    scores: Float[Tensor, "batch heads rows blocks"], limits: BlockRows, budget: float
) -> Bool[Tensor, "batch heads rows blocks"]:
    """Best blocks of every row: ⌈budget · allowed⌉ of them, forced blocks first and never dropped.

    Args:
        scores: Estimates; larger is better.
        limits: Allowed and forced blocks.
        budget: Share of the allowed blocks.
    """
    allowed, forced = limits.allowed, limits.forced
    # a small tolerance: 0.3 · 10 is 3.0000000000000004 in binary
    count = torch.ceil(allowed.sum(-1).double() * budget - 1e-9).long()
    count = torch.maximum(count, forced.sum(-1)).clamp_max(scores.shape[-1])  # [batch 1 rows]
    ranked = scores.masked_fill(~allowed, -torch.inf).masked_fill_(forced, torch.inf)
    best = ranked.topk(max(1, int(count.max())), dim=-1)
    # [kept] < [batch 1 rows 1]
    kept = (torch.arange(best.values.shape[-1], device=scores.device) < count[..., None]) & (best.values > -torch.inf)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best.indices, kept)


def _pooled_queries(query: Tensor, real: Tensor, unit: int, start: Tensor | None) -> Tensor:
    """Mean queries of blocks, counted from the first token [batch heads blocks width]."""
    return pool_queries(query, real, unit) if start is None else pool_keys(query, real, unit, start).mean


def _real(padding: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """True for non-padding tokens [batch length]."""
    return torch.ones(batch, length, dtype=torch.bool, device=device) if padding is None else padding.to(device)
