"""From queries and keys to a graph, by the rule that the settings name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder import baselines, buckets
from graftwork.methods.sparsefinder.config import CLUSTERED, SparsefinderConfig
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, block_vectors
from graftwork.surgery.masks import LazyMask


@dataclass(frozen=True, slots=True)
class Learned:
    """What a predictor has learned for one attention module, apart from its projections."""

    centroids: Float[Tensor, "heads runs clusters width"] | None = None
    thresholds: Float[Tensor, " heads"] | None = None
    query_boundaries: Float[Tensor, "heads width inner"] | None = None
    """Frozen bin boundaries of decoders."""
    key_boundaries: Float[Tensor, "heads width inner"] | None = None


def predict_graph(
    config: SparsefinderConfig,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    mask: LazyMask,
    learned: Learned,
    *,
    cross: bool = False,
    frozen: bool = False,
    query_real: Tensor | None = None,
) -> Graph:
    """The predicted graph of projected queries and keys, with its fixed patterns and under its mask.

    Args:
        config: Which rule, and its parameters.
        query: Projected queries, one per head.
        key: Projected keys, repeated for grouped queries.
        mask: Padding, causality and offsets.
        learned: Centroids, thresholds and boundaries.
        cross: Whether keys belong to another sequence; band and globals are then off unless the settings ask for them.
        frozen: Use frozen bin boundaries, so that no row depends on another token.
        query_real: Real queries; the rows of others are empty in the result. None takes all.

    Raises:
        ConfigError: If the rule cannot be used here.
    """
    real_key = _real(mask.padding, mask.batch, mask.keys, query.device)
    real_query = _real(_query_padding(mask, cross), mask.batch, mask.queries, query.device)
    if query_real is not None:
        real_query = real_query & query_real
    heads, unit = query.shape[1], config.block_size
    if unit > 1 and config.grouping not in _PLACED:
        query, real_query_units = block_vectors(query, real_query, unit)
        key, real_key_units = block_vectors(key, real_key, unit)
    else:
        real_query_units, real_key_units = real_query, real_key
        unit = unit if config.grouping == "window" else 1
    parts: dict[str, Any] = {}
    if config.grouping in _PLACED:
        parts["edges"] = None if config.grouping == "window" else _placed(config, heads, mask, cross, query.device)
    elif config.grouping == "distance":
        parts["edges"] = _near(config, query, key, mask, learned, real_key_units, unit)
    elif config.grouping not in (None, "gold"):
        rule = _RULES[config.grouping]
        parts["query_buckets"], parts["key_buckets"] = rule(
            config, query, key, real_query_units, real_key_units, learned, frozen
        )
    fixed = not cross or config.cross_patterns
    pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask) if fixed else Pattern()
    return Graph(heads, mask, pattern=pattern, unit=unit, query_real=query_real, **parts)


def _query_padding(mask: LazyMask, cross: bool) -> Tensor | None:
    if cross or mask.padding is None:
        return None
    start = mask.query_offset - mask.key_offset
    part = mask.padding[:, start : start + mask.queries]
    return part if part.shape[1] == mask.queries else None


def _real(padding: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
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
    threshold = config.threshold if config.threshold is not None else learned.thresholds
    if threshold is None:
        raise ConfigError("Found no threshold for grouping distance. Set threshold, or train with target_sparsity.")
    if config.distance == "entmax":
        allowed = mask.block(0, mask.queries, device=query.device) if unit == 1 else real_key[:, None, None]
        alphas = torch.as_tensor(threshold, dtype=torch.float64).flatten().tolist()
        if len(alphas) > 1:
            raise ConfigError(f"Found {len(alphas)} thresholds. Expected one α for distance entmax.")
        return buckets.entmax_edges(query, key, alphas[0], allowed)
    distance = buckets.distances(query, key, config.distance, p=config.distance_p)
    return buckets.nearer_than(distance, torch.as_tensor(threshold))


def _bins(
    config: SparsefinderConfig,
    query: Tensor,
    key: Tensor,
    real_query: Tensor,
    real_key: Tensor,
    learned: Learned,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    if frozen:
        if learned.query_boundaries is None or learned.key_boundaries is None:
            raise ConfigError("Found no frozen bins. Train first: decoders use bins frozen from the training split.")
        count = learned.query_boundaries.shape[-1] + 1
        numbers = (
            buckets.frozen_bins(query, learned.query_boundaries, real_query),
            buckets.frozen_bins(key, learned.key_boundaries, real_key),
        )
    else:
        size = config.bucket_size
        count = -(-max(query.shape[2], key.shape[2]) // size)
        if config.same_size:
            numbers = buckets.fixed_bins(query, real_query, size), buckets.fixed_bins(key, real_key, size)
        else:
            numbers = (
                buckets.dynamic_bins(query, real_query, size, config.temperature),
                buckets.dynamic_bins(key, real_key, size, config.temperature),
            )
    return buckets.one_hot_sets(numbers[0], count), buckets.one_hot_sets(numbers[1], count)


def _clusters(
    config: SparsefinderConfig,
    query: Tensor,
    key: Tensor,
    real_query: Tensor,
    real_key: Tensor,
    learned: Learned,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    centroids = _centroids(learned)
    top = min(config.top_clusters, centroids.shape[2])
    return (
        buckets.cluster_sets(query.float(), centroids, top, real_query),
        buckets.cluster_sets(key.float(), centroids, top, real_key),
    )


def _routing(
    config: SparsefinderConfig,
    query: Tensor,
    key: Tensor,
    real_query: Tensor,
    real_key: Tensor,
    learned: Learned,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    centroids = _centroids(learned)[:, 0]
    numbers = (
        baselines.routing_buckets(query.float(), centroids, real_query),
        baselines.routing_buckets(key.float(), centroids, real_key),
    )
    count = centroids.shape[1]
    return buckets.one_hot_sets(numbers[0][..., None], count), buckets.one_hot_sets(numbers[1][..., None], count)


def _hashes(
    config: SparsefinderConfig,
    query: Tensor,
    key: Tensor,
    real_query: Tensor,
    real_key: Tensor,
    learned: Learned,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    numbers = baselines.reformer_buckets(query, key, config.baseline_size, config.hash_rounds, config.seed)
    flags = buckets.one_hot_sets(numbers, config.baseline_size, real_key)
    return flags, flags


def _centroids(learned: Learned) -> Tensor:
    if learned.centroids is None:
        raise ConfigError(f"Found no centroids. Train first; {' and '.join(sorted(CLUSTERED))} need the cluster phase.")
    return learned.centroids


def _placed(config: SparsefinderConfig, heads: int, mask: LazyMask, cross: bool, device: torch.device) -> Tensor:
    """Graphs that positions alone decide, laid out for each sentence from its own first token."""
    if cross:
        raise ConfigError(
            f"grouping {config.grouping} goes by positions within one sequence, which cross-attention does not have. "
            "Set attention_kinds to self."
        )
    build = _PLACED[config.grouping or ""]
    edges = torch.zeros(mask.batch, heads, mask.queries, mask.keys, dtype=torch.bool, device=device)
    position = torch.arange(mask.keys, device=device)
    real = _real(mask.padding, mask.batch, mask.keys, device)
    starts = mask.starts().tolist()
    ends = ((real * (position + 1)).amax(1) + mask.key_offset).tolist()
    known: dict[int, Tensor] = {}
    query = torch.arange(mask.queries, device=device) + mask.query_offset
    key = position + mask.key_offset
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = end - start
        if length not in known:
            known[length] = build(config, heads, length).to(device)
        own, other = (query >= start) & (query < end), (key >= start) & (key < end)
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


_RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "quantize": _bins, "kmeans": _clusters, "routing": _routing, "reformer": _hashes,
}  # fmt: skip
_PLACED: dict[str, Callable[[SparsefinderConfig, int, int], Tensor]] = {
    "window": _random, "random": _random, "bigbird": _bigbird, "longformer": _longformer, "openai_sparse": _openai,
}  # fmt: skip
