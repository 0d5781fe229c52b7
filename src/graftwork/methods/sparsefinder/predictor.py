"""Prediction of the attention graph from queries and keys, by the grouping of the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder import baselines, buckets
from graftwork.methods.sparsefinder.config import CLUSTERED, SparsefinderConfig
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, block_vectors
from graftwork.methods.sparsefinder.tensors import integers, numbers
from graftwork.surgery.masks import LazyMask


@dataclass(frozen=True, slots=True)
class Learned:
    """Fitted values of one attention module, apart from its projections."""

    centroids: Float[Tensor, "heads runs clusters width"] | None = None
    thresholds: Float[Tensor, " heads"] | None = None
    query_boundaries: Float[Tensor, "heads width inner"] | None = None
    """Frozen bin boundaries of decoders for queries."""
    key_boundaries: Float[Tensor, "heads width inner"] | None = None
    """Frozen bin boundaries of decoders for keys."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Projected queries and keys, or block vectors of them, with True for non-padding units."""

    query: Float[Tensor, "batch heads queries width"]
    key: Float[Tensor, "batch heads keys width"]
    real_query: Bool[Tensor, "batch queries"]
    real_key: Bool[Tensor, "batch keys"]

    def both(self, rule: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Apply a rule to the queries and to the keys."""
        return rule(self.query, self.real_query), rule(self.key, self.real_key)


def predict_graph(
    config: SparsefinderConfig,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    mask: LazyMask,
    learned: Learned,
    *,
    cross: bool = False,
    frozen: bool = False,
    query_real: Bool[Tensor, "batch queries"] | None = None,
) -> Graph:
    """Predict the graph of projected queries and keys, with fixed patterns and mask.

    Args:
        config: Grouping and its parameters.
        query: Projected queries.
        key: Projected keys, repeated for grouped queries.
        mask: Padding, causality and offsets.
        learned: Centroids, thresholds and boundaries.
        cross: True if keys belong to another sequence; band and global tokens are then off unless `cross_patterns`.
        frozen: Use frozen bin boundaries, so that no row depends on other tokens.
        query_real: True for non-padding queries; the rows of padding are empty. None if no query is padding.

    Raises:
        ConfigError: If the grouping does not support these inputs, or its fitted values are missing.
    """
    real_key = _real(mask.padding, mask.batch, mask.keys, query.device)
    real_query = _real(_query_padding(mask, cross), mask.batch, mask.queries, query.device)
    if query_real is not None:
        real_query = real_query & query_real
    heads, unit = query.shape[1], config.block_size
    if unit > 1 and config.grouping not in _PLACED and config.grouping != "gold":
        query, real_query_units = block_vectors(query, real_query, unit)
        key, real_key_units = block_vectors(key, real_key, unit)
    else:
        real_query_units, real_key_units = real_query, real_key
        unit = unit if config.grouping == "window" else 1
    edges: Tensor | None = None
    sets: tuple[Tensor | None, Tensor | None] = (None, None)
    if config.grouping in _PLACED:
        edges = None if config.grouping == "window" else _placed(config, heads, mask, cross, query.device)
    elif config.grouping == "distance":
        edges = _near(config, query, key, mask, learned, real_key_units, unit)
    elif config.grouping not in (None, "gold"):
        tokens = _Tokens(query, key, real_query_units, real_key_units)
        sets = _RULES[config.grouping](config, tokens, learned, frozen)
    fixed = not cross or config.cross_patterns
    pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask) if fixed else Pattern()
    return Graph(heads, mask, *sets, edges, pattern, unit, query_real)


def _query_padding(mask: LazyMask, cross: bool) -> Tensor | None:
    """Padding of the queries, as far as the padding of the keys determines it [batch queries]."""
    if cross or mask.padding is None:
        return None
    start = mask.query_offset - mask.key_offset
    part = mask.padding[:, start : start + mask.queries]
    return part if part.shape[1] == mask.queries else None


def _real(padding: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """True for non-padding tokens [batch length]."""
    return torch.ones(batch, length, dtype=torch.bool, device=device) if padding is None else padding.to(device)


def _near(
    config: SparsefinderConfig,
    query: Tensor,
    key: Tensor,
    mask: LazyMask,
    learned: Learned,
    real_key: Tensor,
    unit: int,
) -> Tensor:
    """Edges of grouping distance [batch heads units units]."""
    threshold = config.threshold if config.threshold is not None else learned.thresholds
    if threshold is None:
        raise ConfigError("Found no threshold for grouping distance. Set threshold, or train with target_sparsity.")
    if config.distance == "entmax":
        # [batch 1 1 units] for blocks
        allowed = mask.block(0, mask.queries, device=query.device) if unit == 1 else real_key[:, None, None]
        alphas = numbers(torch.as_tensor(threshold, dtype=torch.float64).flatten())
        if len(alphas) > 1:
            raise ConfigError(f"Found {len(alphas)} thresholds. Expected one α for distance entmax.")
        return buckets.entmax_edges(query, key, alphas[0], allowed)
    distance = buckets.distances(query, key, config.distance, p=config.distance_p)
    return buckets.nearer_than(distance, torch.as_tensor(threshold))


def _bins(config: SparsefinderConfig, tokens: _Tokens, learned: Learned, frozen: bool) -> tuple[Tensor, Tensor]:
    if frozen:
        bounds = (learned.query_boundaries, learned.key_boundaries)
        if bounds[0] is None or bounds[1] is None:
            raise ConfigError("Found no frozen bins. Train first: decoders use bins frozen from the training split.")
        count = bounds[0].shape[-1] + 1
        bins = (
            buckets.frozen_bins(tokens.query, bounds[0], tokens.real_query),
            buckets.frozen_bins(tokens.key, bounds[1], tokens.real_key),
        )
    else:
        size = config.bucket_size
        count = -(-max(tokens.query.shape[2], tokens.key.shape[2]) // size)
        if config.same_size:
            bins = tokens.both(lambda one, real: buckets.fixed_bins(one, real, size))
        else:
            bins = tokens.both(lambda one, real: buckets.dynamic_bins(one, real, size, config.temperature))
    return buckets.one_hot_sets(bins[0], count), buckets.one_hot_sets(bins[1], count)


def _clusters(config: SparsefinderConfig, tokens: _Tokens, learned: Learned, frozen: bool) -> tuple[Tensor, Tensor]:
    centroids = _centroids(learned)
    top = min(config.top_clusters, centroids.shape[2])
    return tokens.both(lambda one, real: buckets.cluster_sets(one.float(), centroids, top, real))


def _routing(config: SparsefinderConfig, tokens: _Tokens, learned: Learned, frozen: bool) -> tuple[Tensor, Tensor]:
    centroids = _centroids(learned)[:, 0]

    def sets(one: Tensor, real: Tensor) -> Tensor:
        clusters = baselines.routing_buckets(one.float(), centroids, real)
        return buckets.one_hot_sets(clusters[..., None], centroids.shape[1])  # [batch heads tokens 1]

    return tokens.both(sets)


def _hashes(config: SparsefinderConfig, tokens: _Tokens, learned: Learned, frozen: bool) -> tuple[Tensor, Tensor]:
    hashes = baselines.reformer_buckets(tokens.query, tokens.key, config.baseline_size, config.hash_rounds, config.seed)
    flags = buckets.one_hot_sets(hashes, config.baseline_size, tokens.real_key)
    return flags, flags


def _centroids(learned: Learned) -> Tensor:
    if learned.centroids is None:
        raise ConfigError(f"Found no centroids. Train first; {' and '.join(sorted(CLUSTERED))} need the cluster phase.")
    return learned.centroids


def _placed(config: SparsefinderConfig, heads: int, mask: LazyMask, cross: bool, device: torch.device) -> Tensor:
    """Edges that depend on positions only, counted from the first token of each sentence [batch heads queries keys]."""
    if cross:
        raise ConfigError(
            f"grouping {config.grouping} needs queries and keys of one sequence, which cross-attention does not have. "
            "Set attention_kinds to self."
        )
    build = _PLACED[config.grouping or ""]
    edges = torch.zeros(mask.batch, heads, mask.queries, mask.keys, dtype=torch.bool, device=device)
    position = torch.arange(mask.keys, device=device)
    real = _real(mask.padding, mask.batch, mask.keys, device)
    starts = integers(mask.starts())
    ends = integers((real * (position + 1)).amax(1) + mask.key_offset)
    known: dict[int, Tensor] = {}
    query = torch.arange(mask.queries, device=device) + mask.query_offset
    key = position + mask.key_offset
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = end - start
        if length not in known:
            known[length] = build(config, heads, length).to(device)
        own, other = (query >= start) & (query < end), (key >= start) & (key < end)
        # [1 or heads length length] → [heads own other]
        part = known[length][:, query[own] - start][:, :, key[other] - start].expand(heads, -1, -1)
        edges[row, :, own.nonzero(), other.nonzero()[:, 0]] = part
    return edges


def _random(config: SparsefinderConfig, heads: int, length: int) -> Tensor:
    density = config.threshold if isinstance(config.threshold, float) else 0.0
    return baselines.random_edges(heads, length, length, density, config.seed)


def _bigbird(config: SparsefinderConfig, heads: int, length: int) -> Tensor:
    return baselines.bigbird_edges(
        heads, length, config.baseline_size, config.seed, reference_plan=config.reference_plan
    )


def _longformer(config: SparsefinderConfig, heads: int, length: int) -> Tensor:
    return baselines.longformer_edges(length, config.baseline_size, config.seed)[None]


def _openai(config: SparsefinderConfig, heads: int, length: int) -> Tensor:
    return baselines.openai_sparse_edges(length, length, config.baseline_size)[None]


_RULES: dict[str, Callable[[SparsefinderConfig, _Tokens, Learned, bool], tuple[Tensor, Tensor]]] = {
    "quantize": _bins,
    "kmeans": _clusters,
    "routing": _routing,
    "reformer": _hashes,
}
_PLACED: dict[str, Callable[[SparsefinderConfig, int, int], Tensor]] = {
    "window": _random,
    "random": _random,
    "bigbird": _bigbird,
    "longformer": _longformer,
    "openai_sparse": _openai,
}
