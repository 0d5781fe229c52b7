"""Bucketing rules: which buckets a projected vector falls into, and which pairs lie near enough."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError

Real = Bool[Tensor, "batch tokens"]


def distances(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    name: str,
    *,
    p: float = 2.0,
) -> Float[Tensor, "batch heads queries keys"]:
    """Distance of every projected query to every projected key.

    Source: section 3.6 of the specification; never below zero, where rounding would put a vector nearer to itself than
    it can be.

    Args:
        query: Projected queries.
        key: Projected keys.
        name: cos, euclidean, l2 (squared), direction, minkowski, min or min_norm.
        p: Of the norms in minkowski, direction and min_norm.

    Raises:
        ConfigError: If there is no such distance.
    """
    if name in ("direction", "min_norm"):
        query, key = (F.normalize(x, p=p, dim=-1) for x in (query, key))
    if name == "cos":
        query, key = (F.normalize(x, dim=-1) for x in (query, key))
        return (1 - query @ key.mT).clamp_min_(0.0)
    if name in ("l2", "euclidean"):
        squared = query.square().sum(-1)[..., None] + key.square().sum(-1)[..., None, :] - 2 * (query @ key.mT)
        squared = squared.clamp_min(0.0)
        return squared if name == "l2" else squared.sqrt()
    if name in ("direction", "minkowski"):
        return torch.cdist(query, key, p=p)
    if name in ("min", "min_norm"):
        best = (query[..., :1] - key[..., None, :, 0]).square()
        for column in range(1, query.shape[-1]):
            # coordinate by coordinate: all at once would be width times as large
            best = torch.minimum(best, (query[..., column, None] - key[..., None, :, column]).square())
        return best
    raise ConfigError(
        f"distance is {name!r}. Expected one of: cos, euclidean, l2, direction, minkowski, min, min_norm, entmax."
    )


def nearer_than(distance: Float[Tensor, "batch heads queries keys"], threshold: Tensor | float) -> Tensor:
    """Connect below the threshold, strictly.

    Raises:
        ConfigError: If there is one threshold per head, but for another number of heads.
    """
    limit = torch.as_tensor(threshold, dtype=distance.dtype, device=distance.device)
    if limit.ndim and limit.numel() not in (1, distance.shape[1]):
        raise ConfigError(
            f"Found {limit.numel()} thresholds. Expected one number, or one for each of {distance.shape[1]} heads."
        )
    return distance < limit.reshape(-1, 1, 1)


def entmax_edges(query: Tensor, key: Tensor, alpha: float, allowed: Tensor | None) -> Tensor:
    """Connect where α-entmax of the projected scores is above zero."""
    from graftwork.methods.sparsefinder.entmax import entmax

    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return entmax(scores, float(alpha)) > 0


def one_hot_sets(
    numbers: Int[Tensor, "batch heads tokens rounds"], count: int, real: Real | None = None
) -> Bool[Tensor, "batch heads tokens buckets"]:
    """Bucket numbers of each round as one row of flags; −1 and padding are in no bucket."""
    flags = F.one_hot(numbers.clamp_min(0), count).bool() & (numbers >= 0)[..., None]
    if real is not None:
        flags = flags & real[:, None, :, None, None]
    return flags.flatten(3)


def fixed_bins(
    values: Float[Tensor, "batch heads tokens width"], real: Real, size: int
) -> Int[Tensor, "batch heads tokens width"]:
    """Rank of each value among the real ones of its sentence and coordinate, divided by the bin size.

    Source: section 3.7, equal counts; ties keep the order of positions. Padding gets −1.
    """
    spread = values.masked_fill(~real[:, None, :, None], torch.inf)
    rank = spread.argsort(dim=2, stable=True).argsort(dim=2, stable=True)
    return (rank // size).masked_fill(~real[:, None, :, None], -1)


def dynamic_bins(
    values: Float[Tensor, "batch heads tokens width"], real: Real, size: int, temperature: float = 1.0
) -> Int[Tensor, "batch heads tokens width"]:
    """Number of interior boundaries −1 + 2i/β below tanh(temperature · x), β from the sentence's own length.

    Source: section 3.7, equal widths. Differs from the authors' code, where β comes from the padded length.
    """
    bins = -(-real.sum(1) // size)
    squashed = torch.tanh(temperature * values)
    inner = torch.arange(1, max(int(bins.max()), 2), device=values.device)
    boundaries = -1 + 2 * inner[None, :] / bins.clamp_min(1)[:, None]
    boundaries = boundaries.masked_fill(inner[None, :] >= bins[:, None], torch.inf).to(values.dtype)
    numbers = (squashed[..., None] > boundaries[:, None, None, None, :]).sum(-1)
    return numbers.masked_fill(~real[:, None, :, None], -1)


def frozen_bins(
    values: Float[Tensor, "batch heads tokens width"],
    boundaries: Float[Tensor, "heads width inner"],
    real: Real,
) -> Int[Tensor, "batch heads tokens width"]:
    """Number of given boundaries that lie below each value; nothing of it depends on the other tokens."""
    numbers = (values[..., None] > boundaries[None, :, None]).sum(-1)
    return numbers.masked_fill(~real[:, None, :, None], -1)


def cluster_sets(
    vectors: Float[Tensor, "batch heads tokens width"],
    centroids: Float[Tensor, "heads runs clusters width"],
    top: int,
    real: Real | None = None,
) -> Bool[Tensor, "batch heads tokens buckets"]:
    """The `top` nearest clusters of each vector in every run, as flags; ties go to the lower number.

    Source: section 3.8. Differs from the authors' tensors, which compare ranks instead of sets.

    Args:
        vectors: Projected queries or keys.
        centroids: Centres; rows that are not finite stand for clusters that do not exist.
        top: Clusters of each vector.
        real: Tokens that are in clusters; the others are in none.

    Raises:
        ConfigError: If more clusters are asked for than centroids have places.
    """
    heads, runs, clusters, width = centroids.shape
    if top > clusters:
        raise ConfigError(f"top_clusters is {top} of {clusters} clusters. Expected at most as many.")
    exists = centroids.isfinite().all(-1)
    centres = centroids.masked_fill(~exists[..., None], 0.0).reshape(heads, runs * clusters, width)
    squared = centres.square().sum(-1)[None, :, None] - 2 * vectors @ centres.mT[None]
    squared = squared.masked_fill(~exists.reshape(1, heads, 1, -1), torch.inf).unflatten(3, (runs, clusters))
    order = squared.sort(dim=-1, stable=True).indices[..., :top]
    flags = torch.zeros_like(squared, dtype=torch.bool).scatter_(-1, order, True)
    flags = flags & exists[None, :, None]
    if real is not None:
        flags = flags & real[:, None, :, None, None]
    return flags.flatten(3)
