"""What is fitted after the projections: centroids, frozen bins, and thresholds for a target sparsity."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import MissingExtraError
from graftwork.methods.sparsefinder import buckets
from graftwork.methods.sparsefinder.baselines import spherical_kmeans
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import HeadBatch
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, block_vectors, blocks_of
from graftwork.methods.sparsefinder.modules import SparsefinderAttention
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph

logger = logging.getLogger(__name__)

CALIBRATED_SENTENCES = 64
"""Sentences that thresholds and numbers of clusters are calibrated on."""


def kmeans(points: Float[Tensor, "points width"], clusters: int, run: int, seed: int = 0) -> Tensor:
    """Centres of k-means; fewer distinct points than clusters leave rows of NaN behind the real centres.

    Source: section 3.8: run 0 starts by k-means++, later ones at random. Differs: mini-batches, duplicates dropped.

    Args:
        points: Projected queries and keys of one head together.
        clusters: Number of centres.
        run: Number of the run, part of its random state.
        seed: The other part.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise MissingExtraError("scikit-learn", "sparsefinder") from None
    distinct = torch.unique(points, dim=0)
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
            # it warns of memory on some systems, and of fewer clusters, which is handled here
            warnings.simplefilter("ignore")
            model.fit(points.numpy())
        centres = torch.unique(torch.from_numpy(model.cluster_centers_), dim=0)
    return torch.nn.functional.pad(centres.float(), (0, 0, 0, clusters - len(centres)), value=torch.nan)


def fit_centroids(points: Float[Tensor, "heads points width"], config: SparsefinderConfig, clusters: int) -> Tensor:
    """Centroids of every head and run [heads runs clusters width]."""
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
    """Projected queries and keys as the grouping sees them, in blocks if it does, and which are real.

    Blocks are those of the module's settings unless another size is given.
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
    """Fit everything that a module's grouping needs, and switch its graph on.

    Args:
        graft: The module; its buffers are filled.
        batches: Queries and keys of the training split in this module.

    Returns:
        What to record: clusters found, and how near the target sparsity came.
    """
    config, notes = graft.config, {}
    queries, keys = [], []
    for data in batches:
        query, key, query_real, key_real = projected_points(graft, data)
        queries += [query[row][:, query_real[row]] for row in range(len(query))]
        keys += [key[row][:, key_real[row]] for row in range(len(key))]
    query_points, key_points = torch.cat(queries, 1).cpu().float(), torch.cat(keys, 1).cpu().float()
    calibration = list(batches)[: max(1, CALIBRATED_SENTENCES // max(len(batches[0].query), 1))]
    if "centroids" in graft._buffers:
        centroids = _centroids(graft, torch.cat([query_points, key_points], 1), calibration)
        _fill(graft, "centroids", centroids)
        found = centroids.isfinite().all(-1).sum(-1)
        notes["clusters"] = found.tolist()
        if config.target_sparsity is None and int(found.min()) < config.num_clusters:
            logger.warning(
                "Found only %d distinct clusters of %d in a head; the others stay empty.",
                int(found.min()),
                config.num_clusters,
            )
    if "query_boundaries" in graft._buffers:
        for name, points in (("query_boundaries", query_points), ("key_boundaries", key_points)):
            _fill(graft, name, frozen_boundaries(points, config))
    if "thresholds" in graft._buffers:
        thresholds = open_pairs(config, graft, calibration).thresholds(config.target_sparsity or 0.0)
        _fill(graft, "thresholds", thresholds)
        notes["thresholds"] = thresholds.tolist()
    graft.active.fill_(True)
    return notes


def frozen_boundaries(points: Float[Tensor, "heads points width"], config: SparsefinderConfig) -> Tensor:
    """Inner boundaries of bins that hold equally many points, or are equally wide under tanh [heads width inner]."""
    bins = config.num_clusters
    inner = torch.arange(1, bins) / bins
    if config.same_size:
        return torch.quantile(points[:, :: max(1, points.shape[1] // 100_000)], inner, dim=1).permute(1, 2, 0)
    boundaries = torch.atanh((2 * inner - 1).clamp(-1 + 1e-6, 1 - 1e-6)) / config.temperature
    return boundaries.expand(points.shape[0], points.shape[2], bins - 1)


@dataclass(frozen=True, slots=True)
class OpenPairs:
    """Distances of the pairs that no fixed pattern connects, sorted, and how many others there are; per head."""

    ordered: tuple[Float[Tensor, " open"], ...]
    pairs: int
    fixed: int

    def thresholds(self, sparsity: float) -> Tensor:
        """The threshold of every head at which its whole graph, fixed patterns included, has this sparsity.

        A head whose fixed patterns are denser than that already gets 0, so nothing is added.
        """
        wanted = round((1 - sparsity) * self.pairs - self.fixed)
        found = [
            0.0 if wanted <= 0 else float(own[wanted]) if wanted < len(own) else float("inf") for own in self.ordered
        ]
        return torch.tensor(found)


def open_pairs(config: SparsefinderConfig, graft: SparsefinderAttention, batches: Sequence[HeadBatch]) -> OpenPairs:
    """Distances of projected queries and keys outside the fixed patterns of a module."""
    free: list[list[Tensor]] = [[] for _ in range(graft.heads)]
    pairs = fixed_pairs = 0
    for data in batches:
        query, key, *_ = projected_points(graft, data, config.block_size)
        distance = buckets.distances(query, key, config.distance, p=config.distance_p)
        allowed, fixed = _allowed_and_fixed(config, graft.cross, data)
        chosen = (allowed & ~fixed)[:, 0]
        pairs += int(allowed.sum())
        fixed_pairs += int((allowed & fixed).sum())
        for head in range(graft.heads):
            free[head].append(distance[:, head][chosen].cpu())
    return OpenPairs(tuple(torch.cat(own).sort().values for own in free), pairs, fixed_pairs)


def _allowed_and_fixed(config: SparsefinderConfig, cross: bool, data: HeadBatch) -> tuple[Tensor, Tensor]:
    fixed_on = not cross or config.cross_patterns
    pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask) if fixed_on else Pattern()
    graph = Graph(1, data.mask, pattern=pattern, unit=config.block_size, query_real=data.query_real)
    allowed, fixed = data.allowed, graph.dense(data.query.device)
    if config.block_size > 1:
        return blocks_of(allowed, config.block_size), blocks_of(fixed, config.block_size)
    return allowed, fixed


def _centroids(graft: SparsefinderAttention, points: Tensor, batches: Sequence[HeadBatch]) -> Tensor:
    """Centroids for `num_clusters`, or per head for the number that comes nearest to the target sparsity."""
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
        off = (_sparsity(graft, padded, batches) - config.target_sparsity).abs()
        nearer = off < distance_to
        best = padded if best is None else torch.where(nearer[:, None, None, None], padded, best)
        distance_to = torch.minimum(off, distance_to)
    return points if best is None else best


def _sparsity(graft: SparsefinderAttention, centroids: Tensor, batches: Sequence[HeadBatch]) -> Tensor:
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
        edges += graph.dense(query.device).sum((0, 2, 3)).cpu()
        pairs += data.allowed.sum().cpu()
    return 1 - edges / pairs.clamp_min(1)


def _fill(graft: SparsefinderAttention, name: str, values: Tensor) -> None:
    buffer = graft._buffers[name]
    if buffer is not None:
        buffer.copy_(values)


def projection_hash(graft: SparsefinderAttention) -> str:
    """A short name for a module's projections, which centroids and thresholds belong to."""
    digest = hashlib.sha256()
    for projection in (graft.query_projection, graft.key_projection):
        for parameter in () if projection is None else projection.parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
