"""Bucketing rules: buckets of a projected vector, and pairs of vectors below a distance threshold."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.tensors import unflatten
from graftwork.surgery.precision import attention_scores, compute_dtype

Real = Bool[Tensor, "batch tokens"]
"""True for tokens that are not padding."""


def distances(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    name: str,
    *,
    p: float = 2.0,
) -> Float[Tensor, "batch heads queries keys"]:
    """Distance of every projected query to every projected key.

    | name | distance |
    |---|---|
    | cos | 1 − q·k / (‖q‖ ‖k‖) |
    | l2 | ‖q − k‖² = ‖q‖² + ‖k‖² − 2 q·k |
    | euclidean | ‖q − k‖ |
    | minkowski | ‖q − k‖_p |
    | direction | ‖q/‖q‖_p − k/‖k‖_p‖_p |
    | min | min_i (q_i − k_i)² |
    | min_norm | min of q/‖q‖_p and k/‖k‖_p |

    Source: section 3.6 of the specification. Rounding errors below zero are clamped.

    Args:
        query: Projected queries.
        key: Projected keys.
        name: Name of the distance.
        p: Order of the norms in minkowski, direction and min_norm.

    Raises:
        ConfigError: If no distance has this name.
    """
    # ‖q‖² + ‖k‖² − 2 q·k of near vectors cancels, to nothing but rounding in half precision
    query, key = query.to(compute_dtype(query.dtype)), key.to(compute_dtype(key.dtype))
    if name in ("direction", "min_norm"):
        query, key = (F.normalize(x, p=p, dim=-1) for x in (query, key))
    if name == "cos":
        query, key = (F.normalize(x, dim=-1) for x in (query, key))
        return (1 - query @ key.mT).clamp_min_(0.0)  # [batch heads queries keys]
    if name in ("l2", "euclidean"):
        # [… queries 1] + [… 1 keys] − [… queries keys]
        squared = query.square().sum(-1)[..., None] + key.square().sum(-1)[..., None, :] - 2 * (query @ key.mT)
        squared = squared.clamp_min(0.0)
        return squared if name == "l2" else squared.sqrt()
    if name in ("direction", "minkowski"):
        return torch.cdist(query, key, p=p)
    if name in ("min", "min_norm"):
        best = (query[..., :1] - key[..., None, :, 0]).square()  # [… queries 1] − [… 1 keys]
        for column in range(1, query.shape[-1]):
            # one coordinate at a time: all coordinates together need `width` times the memory
            best = torch.minimum(best, (query[..., column, None] - key[..., None, :, column]).square())
        return best
    raise ConfigError(
        f"distance is {name!r}. Expected one of: cos, euclidean, l2, direction, minkowski, min, min_norm, entmax."
    )


def nearer_than(distance: Float[Tensor, "batch heads queries keys"], threshold: Tensor | float) -> Tensor:
    """True for pairs whose distance is strictly below `threshold`, a scalar or a tensor [heads].

    Raises:
        ConfigError: If the number of thresholds is neither 1 nor the number of heads.
    """
    limit = torch.as_tensor(threshold, dtype=distance.dtype, device=distance.device)
    if limit.ndim and limit.numel() not in (1, distance.shape[1]):
        raise ConfigError(
            f"Found {limit.numel()} thresholds. Expected one number, or one for each of {distance.shape[1]} heads."
        )
    return distance < limit.reshape(-1, 1, 1)  # [batch heads queries keys] < [heads 1 1]


def entmax_edges(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    alpha: float,
    allowed: Bool[Tensor, "... queries keys"] | None,
) -> Bool[Tensor, "batch heads queries keys"]:
    """True where α-entmax(q·k / √width) of the projected vectors is positive; `allowed` masks the scores."""
    from graftwork.methods.sparsefinder.entmax import entmax

    scores = attention_scores(query, key, query.shape[-1] ** -0.5, centred=True)  # [batch heads queries keys]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return entmax(scores, float(alpha)) > 0


def one_hot_sets(
    numbers: Int[Tensor, "batch heads tokens rounds"], count: int, real: Real | None = None
) -> Bool[Tensor, "batch heads tokens buckets"]:
    """Bucket numbers of all rounds as one row of flags, buckets = rounds · count; −1 and padding are in no bucket."""
    flags = (
        F.one_hot(numbers.clamp_min(0), count).bool() & (numbers >= 0)[..., None]
    )  # [batch heads tokens rounds count]
    if real is not None:
        flags = flags & real[:, None, :, None, None]  # [batch 1 tokens 1 1]
    return flags.flatten(3)  # [batch heads tokens rounds·count]


def fixed_bins(
    values: Float[Tensor, "batch heads tokens width"], real: Real, size: int
) -> Int[Tensor, "batch heads tokens width"]:
    """Bins of equal count: ⌊rank / size⌋ of each value among the non-padding tokens, per sentence and coordinate.

    Source: section 3.7; ties keep the order of positions. Padding gets −1.
    """
    spread = values.masked_fill(~real[:, None, :, None], torch.inf)  # [batch 1 tokens 1]
    rank = spread.argsort(dim=2, stable=True).argsort(dim=2, stable=True)
    return (rank // size).masked_fill(~real[:, None, :, None], -1)


def dynamic_bins(
    values: Float[Tensor, "batch heads tokens width"], real: Real, size: int, temperature: float = 1.0
) -> Int[Tensor, "batch heads tokens width"]:
    """Bins of equal width: number of boundaries −1 + 2i/β, 0 < i < β, below tanh(temperature · x).

    β = ⌈tokens / size⌉ is computed from the length of each sentence.

    Source: section 3.7. Differs from the authors' code, where β is computed from the padded length.
    """
    bins = -(-real.sum(1) // size)  # [batch]
    squashed = torch.tanh(temperature * values)
    inner = torch.arange(1, max(int(bins.max()), 2), device=values.device)  # [inner]
    boundaries = -1 + 2 * inner[None, :] / bins.clamp_min(1)[:, None]  # [1 inner] / [batch 1]
    boundaries = boundaries.masked_fill(inner[None, :] >= bins[:, None], torch.inf).to(values.dtype)
    # [batch heads tokens width 1] > [batch 1 1 1 inner]
    numbers = (squashed[..., None] > boundaries[:, None, None, None, :]).sum(-1)
    return numbers.masked_fill(~real[:, None, :, None], -1)  # [batch 1 tokens 1]


def frozen_bins(
    values: Float[Tensor, "batch heads tokens width"],
    boundaries: Float[Tensor, "heads width inner"],
    real: Real,
) -> Int[Tensor, "batch heads tokens width"]:
    """Number of given boundaries below each value, independent of all other tokens."""
    numbers = (values[..., None] > boundaries[None, :, None]).sum(-1)  # [b h t w 1] > [1 h 1 w inner]
    return numbers.masked_fill(~real[:, None, :, None], -1)  # [batch 1 tokens 1]


def cluster_sets(
    vectors: Float[Tensor, "batch heads tokens width"],
    centroids: Float[Tensor, "heads runs clusters width"],
    top: int,
    real: Real | None = None,
) -> Bool[Tensor, "batch heads tokens buckets"]:
    """Flags of the `top` nearest clusters of each vector in every run; ties go to the lower number.

    Clusters are ranked by ‖c‖² − 2 x·c, which differs from ‖x − c‖² by a constant per vector.

    Source: section 3.8. Differs from the authors' tensors, which compare ranks instead of sets.

    Args:
        vectors: Projected queries or keys.
        centroids: Centroids; a row with a non-finite value marks an unused cluster.
        top: Number of clusters per vector.
        real: True for tokens to assign; all other tokens are in no cluster.

    Raises:
        ConfigError: If `top` exceeds the number of clusters.
    """
    heads, runs, clusters, width = centroids.shape
    if top > clusters:
        raise ConfigError(f"top_clusters is {top} of {clusters} clusters. Expected at most as many.")
    exists = centroids.isfinite().all(-1)  # [heads runs clusters]
    centres = centroids.masked_fill(~exists[..., None], 0.0).reshape(heads, runs * clusters, width)
    # [1 heads 1 runs·clusters] − [batch heads tokens runs·clusters]
    squared = centres.square().sum(-1)[None, :, None] - 2 * vectors @ centres.mT[None]
    squared = squared.masked_fill(~exists.reshape(1, heads, 1, -1), torch.inf)  # [1 heads 1 runs·clusters]
    squared = unflatten(squared, 3, (runs, clusters))  # [batch heads tokens runs clusters]
    order = squared.sort(dim=-1, stable=True).indices[..., :top]
    flags = torch.zeros_like(squared, dtype=torch.bool).scatter_(-1, order, True)
    flags = flags & exists[None, :, None]  # [1 heads 1 runs clusters]
    if real is not None:
        flags = flags & real[:, None, :, None, None]  # [batch 1 tokens 1 1]
    return flags.flatten(3)  # [batch heads tokens runs·clusters]
