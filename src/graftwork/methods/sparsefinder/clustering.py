"""Fitting after the projections: centroids, frozen bins, and thresholds for a target sparsity."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.errors import MissingExtraError
from graftwork.methods.sparsefinder import buckets
from graftwork.methods.sparsefinder.baselines import spherical_kmeans
from graftwork.methods.sparsefinder.config import BLOCKWISE, SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import HeadBatch
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, block_vectors, blocks_of
from graftwork.methods.sparsefinder.modules import SparsefinderAttention
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.methods.sparsefinder.tensors import numbers, rows_of_numbers, unique

logger = logging.getLogger(__name__)

CALIBRATED_SENTENCES = 64
"""Number of sentences used to calibrate thresholds and numbers of clusters."""


def kmeans(
    points: Float[Tensor, "points width"], clusters: int, run: int, seed: int = 0
) -> Float[Tensor, "clusters width"]:
    """Mini-batch k-means; rows of NaN fill the result if there are fewer distinct points than clusters.

    Source: section 3.8: run 0 is initialised by k-means++, later runs at random. Differs: mini-batches, duplicates
    dropped.

    Args:
        points: Projected queries and keys of one head together.
        clusters: Number of centroids.
        run: Number of the run, part of its random state.
        seed: Other part of the random state.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("scikit-learn", "sparsefinder") from None
    distinct = unique(points, dim=0)
    count = min(clusters, len(distinct))
    if count == len(distinct):
        centres = distinct
    else:
        estimator: Any = MiniBatchKMeans
        model = estimator(
            count,
            init="k-means++" if run == 0 else "random",
            n_init=1,
            random_state=seed * 1000 + run,
            batch_size=4096,
            max_iter=100,
        )
        with warnings.catch_warnings():
            # warnings about memory on some systems, and about fewer clusters, which are handled here
            warnings.simplefilter("ignore")
            model.fit(points.numpy())
        centres = unique(torch.as_tensor(model.cluster_centers_), dim=0)
    return torch.nn.functional.pad(centres.float(), (0, 0, 0, clusters - len(centres)), value=torch.nan)


def fit_centroids(
    points: Float[Tensor, "heads points width"], config: SparsefinderConfig, clusters: int
) -> Float[Tensor, "heads runs clusters width"]:
    """Fit the centroids of every head and run."""
    if config.grouping == "routing":
        return torch.stack([spherical_kmeans(own, clusters, config.seed)[None] for own in points])
    return torch.stack(
        [
            torch.stack([kmeans(own, clusters, run, config.seed) for run in range(config.cluster_rounds)])
            for own in points
        ]
    )


def projected_points(
    graft: SparsefinderAttention, data: HeadBatch, block_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the grouping: projected queries and keys, as block vectors if the block size exceeds 1.

    Args:
        graft: Module with the projections.
        data: Stored queries and keys.
        block_size: Tokens per block; the module's setting if omitted.

    Returns:
        Queries and keys [batch heads units width], and True for their non-padding units [batch units].
    """
    query, key = graft.project(data.query, data.key)
    unit = graft.config.block_size if block_size is None else block_size
    if unit > 1:
        query, query_real = block_vectors(query, data.query_real, unit)
        key, key_real = block_vectors(key, data.key_real, unit)
        return query, key, query_real, key_real
    return query, key, data.query_real, data.key_real


@torch.no_grad()
def fit(graft: SparsefinderAttention, batches: Sequence[HeadBatch]) -> dict[str, Any]:
    """Fit the centroids, bins or thresholds of a module's grouping and activate its graph.

    Args:
        graft: Module whose buffers are filled.
        batches: Queries and keys of the training split in this module.

    Returns:
        Values for the log: numbers of clusters and thresholds.
    """
    config = graft.config
    notes: dict[str, Any] = {}
    if config.grouping in BLOCKWISE:
        # the budget needs no threshold
        graft.active.fill_(True)
        return notes
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for data in batches:
        query, key, query_real, key_real = projected_points(graft, data)
        queries += [query[row][:, query_real[row]] for row in range(len(query))]
        keys += [key[row][:, key_real[row]] for row in range(len(key))]
    # [heads points width]
    query_points, key_points = torch.cat(queries, 1).cpu().float(), torch.cat(keys, 1).cpu().float()
    calibration = list(batches)[: max(1, CALIBRATED_SENTENCES // max(len(batches[0].query), 1))]
    if graft.centroids is not None:
        centroids = _centroids(graft, torch.cat([query_points, key_points], 1), calibration)
        graft.centroids.copy_(centroids)
        found = centroids.isfinite().all(-1).sum(-1)  # [heads runs]
        notes["clusters"] = rows_of_numbers(found)
        if config.target_sparsity is None and int(found.min()) < config.num_clusters:
            logger.warning(
                "Found only %d distinct clusters of %d in a head; the remaining clusters stay empty.",
                int(found.min()),
                config.num_clusters,
            )
    for boundaries, points in ((graft.query_boundaries, query_points), (graft.key_boundaries, key_points)):
        if boundaries is not None:
            boundaries.copy_(frozen_boundaries(points, config))
    if graft.thresholds is not None:
        thresholds = open_pairs(config, graft, calibration).thresholds(config.target_sparsity or 0.0)
        graft.thresholds.copy_(thresholds)
        notes["thresholds"] = numbers(thresholds)
    graft.active.fill_(True)
    return notes


def frozen_boundaries(
    points: Float[Tensor, "heads points width"], config: SparsefinderConfig
) -> Float[Tensor, "heads width inner"]:
    """Inner boundaries of bins with equal counts (quantiles of the points) or equal widths under tanh.

    Boundary i of B bins is the i/B quantile, or atanh(2i/B − 1) / temperature.
    """
    bins = config.num_clusters
    inner = torch.arange(1, bins) / bins  # [inner]
    if config.same_size:
        quantiles = torch.quantile(points[:, :: max(1, points.shape[1] // 100_000)], inner, dim=1)
        return quantiles.permute(1, 2, 0)  # [inner heads width] → [heads width inner]
    boundaries = torch.atanh((2 * inner - 1).clamp(-1 + 1e-6, 1 - 1e-6)) / config.temperature
    return boundaries.expand(points.shape[0], points.shape[2], bins - 1)  # [inner] → [heads width inner]


@dataclass(frozen=True, slots=True)
class OpenPairs:
    """Sorted distances of the pairs outside the fixed patterns, per head, and the numbers of pairs."""

    ordered: tuple[Float[Tensor, " open"], ...]
    """Sorted distances of each head."""
    pairs: int
    """Number of allowed pairs."""
    fixed: int
    """Number of allowed pairs that a fixed pattern connects."""

    def thresholds(self, sparsity: float) -> Float[Tensor, " heads"]:
        """Threshold of every head at which its whole graph, fixed patterns included, has the given sparsity.

        The threshold is the distance of rank (1 − sparsity) · pairs − fixed; it is 0, which adds no edge, if the fixed
        patterns alone are denser than that.
        """
        wanted = round((1 - sparsity) * self.pairs - self.fixed)
        found = [
            0.0 if wanted <= 0 else float(own[wanted]) if wanted < len(own) else float("inf") for own in self.ordered
        ]
        return torch.tensor(found)


def open_pairs(config: SparsefinderConfig, graft: SparsefinderAttention, batches: Sequence[HeadBatch]) -> OpenPairs:
    """Collect the distances of projected queries and keys outside the fixed patterns of a module."""
    free: list[list[Tensor]] = [[] for _ in range(graft.heads)]
    pairs = fixed_pairs = 0
    for data in batches:
        query, key, *_ = projected_points(graft, data, config.block_size)
        distance = buckets.distances(query, key, config.distance, p=config.distance_p)
        allowed, fixed = _allowed_and_fixed(config, graft.cross, data)
        chosen = (allowed & ~fixed)[:, 0]  # [batch units units]
        pairs += int(allowed.sum())
        fixed_pairs += int((allowed & fixed).sum())
        for head in range(graft.heads):
            free[head].append(distance[:, head][chosen].cpu())
    return OpenPairs(tuple(torch.cat(own).sort().values for own in free), pairs, fixed_pairs)


def projection_hash(graft: SparsefinderAttention) -> str:
    """Hash of a module's projections, stored with the centroids and thresholds fitted for them."""
    digest = hashlib.sha256()
    for projection in (graft.query_projection, graft.key_projection):
        for parameter in () if projection is None else projection.parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _allowed_and_fixed(
    config: SparsefinderConfig, cross: bool, data: HeadBatch
) -> tuple[Bool[Tensor, "batch 1 rows columns"], Bool[Tensor, "batch 1 rows columns"]]:
    """Allowed pairs, and pairs of the fixed patterns."""
    fixed_on = not cross or config.cross_patterns
    pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask) if fixed_on else Pattern()
    graph = Graph(1, data.mask, pattern=pattern, unit=config.block_size, query_real=data.query_real)
    allowed, fixed = data.allowed, graph.dense(data.query.device)
    if config.block_size > 1:
        return blocks_of(allowed, config.block_size), blocks_of(fixed, config.block_size)
    return allowed, fixed


def _centroids(graft: SparsefinderAttention, points: Tensor, batches: Sequence[HeadBatch]) -> Tensor:
    """Centroids of `num_clusters` clusters, or of the number per head whose sparsity is nearest to the target."""
    config = graft.config
    clusters = config.num_clusters
    if config.target_sparsity is None:
        return fit_centroids(points, config, clusters)
    candidates = sorted(
        {max(1, round(clusters * share)) for share in (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1)}
    )
    best: Tensor | None = None
    distance_to = torch.full((graft.heads,), torch.inf)
    for count in candidates:
        fitted = fit_centroids(points, config, count)
        padded = torch.nn.functional.pad(fitted, (0, 0, 0, clusters - count), value=torch.nan)
        off = (_sparsity(graft, padded, batches) - config.target_sparsity).abs()  # [heads]
        nearer = off < distance_to
        best = padded if best is None else torch.where(nearer[:, None, None, None], padded, best)  # [heads 1 1 1]
        distance_to = torch.minimum(off, distance_to)
    return points if best is None else best


def _sparsity(graft: SparsefinderAttention, centroids: Tensor, batches: Sequence[HeadBatch]) -> Tensor:
    """Sparsity of the graph predicted with the given centroids [heads]."""
    edges, pairs = torch.zeros(graft.heads), torch.zeros(graft.heads)
    for data in batches:
        query, key = graft.project(data.query, data.key)
        graph = predict_graph(
            graft.config,
            query,
            key,
            data.mask,
            Learned(centroids=centroids.to(query.device)),
            cross=graft.cross,
            query_real=data.query_real,
        )
        edges += graph.dense(query.device).sum((0, 2, 3)).cpu()  # [batch heads queries keys] → [heads]
        pairs += data.allowed.sum().cpu()
    return 1 - edges / pairs.clamp_min(1)
