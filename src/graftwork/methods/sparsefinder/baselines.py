"""Attention patterns of other papers as baselines, each with a private random generator, one sentence at a time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.tensors import integers, row_norm, unique


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """Private generator seeded by all given numbers, independent of the global random state."""
    state = seed & 0xFFFFFFFF
    for number in numbers:
        state = (state * 1_000_003 + number + 1) & 0x7FFFFFFFFFFF
    return torch.Generator().manual_seed(state)


def random_edges(heads: int, queries: int, keys: int, density: float, seed: int) -> Bool[Tensor, "heads queries keys"]:
    """Connect every pair independently with probability `density`.

    The draw is a hash of seed, head and positions, so the graph of a longer sentence starts with the graph of a shorter
    one, and token-by-token decoding uses the same graph.

    Args:
        heads: Number of heads.
        queries: Number of queries.
        keys: Number of keys.
        density: Probability of an edge.
        seed: Seed of the hash.
    """
    head = torch.arange(heads)[:, None, None]  # [heads 1 1]
    query, key = torch.arange(queries)[None, :, None], torch.arange(keys)[None, None, :]  # [1 queries 1], [1 1 keys]
    state = (head * 73_856_093) ^ (query * 19_349_663) ^ (key * 83_492_791) ^ (seed * 2_654_435_761 & 0x7FFFFFFF)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B56C4E9)):
        # 32-bit mixing function in 64-bit integers
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    return (state.double() / 2**32) < density


def bigbird_edges(
    heads: int, length: int, random_keys: int, seed: int, *, reference_plan: bool = False
) -> Bool[Tensor, "heads queries keys"]:
    """Band of width three, global first and last token, and R random keys for every other row.

    Source: Zaheer et al. 2020 at block size 1. Differs from the authors' copy, whose plan for R keys samples them from
    the first 2R + 5 columns (`reference_plan`). Rows of short sentences can have fewer than R random keys.

    Args:
        heads: Number of heads.
        length: Number of tokens.
        random_keys: R.
        seed: Seed of the private generator.
        reference_plan: Sample from the first 2R + 5 columns only.
    """
    position = torch.arange(length)
    edges = (position[:, None] - position[None, :]).abs() <= 1  # [length length]
    edges = edges | (position == 0) | (position == length - 1)
    edges = edges | edges.T
    edges = edges.expand(heads, length, length).clone()
    generator = generator_for(seed, length)
    limit = min(length, 2 * random_keys + 5) if reference_plan and 2 * random_keys + 5 < length else length
    for head in range(heads):
        for row in range(1, length - 1):
            free = (~edges[head, row, : max(limit - (1 if limit < length else 0), 0)]).nonzero().flatten()
            chosen = free[torch.randperm(len(free), generator=generator)[:random_keys]]
            edges[head, row, chosen] = True
    return edges


def longformer_edges(length: int, most_globals: int, seed: int) -> Bool[Tensor, "queries keys"]:
    """Diagonal and g global tokens, 2 ≤ g ≤ max(2, M − 1), with M = `most_globals`; one draw for all heads.

    Source: Beltagy et al. 2020 with random global tokens. Differs from the authors' copy: sampled without replacement
    and from non-padding tokens only.
    """
    generator = generator_for(seed, length)
    highest = max(2, most_globals - 1)
    count = int(torch.randint(2, highest + 1, (1,), generator=generator))
    chosen = torch.randperm(length, generator=generator)[:count]
    edges = torch.eye(length, dtype=torch.bool)
    edges[chosen] = True
    edges[:, chosen] = True
    return edges


def openai_sparse_edges(queries: int, keys: int, stride: int, summary: int = 2) -> Bool[Tensor, "queries keys"]:
    """Fixed pattern of strided windows and summary columns; causality is left to the caller's mask.

    Source: Child et al. 2019, fixed attention; a summary is `summary` + 1 columns wide and ends at a multiple of the
    stride. With a stride of at most `summary`, every column is a summary.
    """
    column, row = torch.arange(keys)[None, :], torch.arange(queries)[:, None]  # [1 keys], [queries 1]
    if stride <= summary:
        return torch.ones(queries, keys, dtype=torch.bool)
    ahead = -column % stride
    summaries = (ahead <= summary) & (column >= stride - summary)
    start = torch.where((row % stride == 0) & (row > 0), row - stride, row - row % stride)
    return summaries | ((column >= start) & (column <= start + stride))


def reformer_buckets(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch heads tokens width"],
    buckets: int,
    hashes: int,
    seed: int,
) -> Int[Tensor, "batch heads tokens hashes"]:
    """Bucket of each position under random rotations R of x = [query; key]: argmax of [xR, −xR].

    Source: Kitaev et al. 2020. Differs from the authors' copy: a private generator, the same rotation in every call.

    Args:
        query: Projected queries.
        key: Projected keys of the same positions.
        buckets: Number of buckets, even.
        hashes: Number of independent rotations.
        seed: Seed of the private generator.

    Raises:
        ConfigError: If the number of buckets is odd, or queries and keys have different positions.
    """
    if buckets % 2 or buckets < 2:
        raise ConfigError(f"Found {buckets} buckets. Expected an even number from 2 for reformer.")
    if query.shape != key.shape:
        raise ConfigError(
            "Found queries and keys of different positions (cross-attention, or one new token). Expected both of the "
            "same positions, because reformer hashes them together. Choose another grouping."
        )
    joined = torch.cat([query, key], dim=-1)  # [batch heads tokens 2·width]
    generator = generator_for(seed, buckets, hashes)
    shape = (query.shape[1], hashes, joined.shape[-1], buckets // 2)
    rotations = torch.randn(shape, generator=generator).to(joined)  # [heads hashes 2·width buckets/2]
    rotated = torch.einsum("bhtw,hrwc->bhtrc", joined, rotations)  # [batch heads tokens hashes buckets/2]
    return torch.cat([rotated, -rotated], dim=-1).argmax(-1)


def routing_buckets(
    vectors: Float[Tensor, "batch heads tokens width"],
    centroids: Float[Tensor, "heads clusters width"],
    real: Bool[Tensor, "batch tokens"],
) -> Int[Tensor, "batch heads tokens"]:
    """Cluster of each token when every centroid selects its ⌊n / C⌋ + 1 nearest tokens; −1 for unselected tokens.

    Source: Roy et al. 2021. Differs from the authors' copy: n counts non-padding tokens only. A token selected by
    several centroids belongs to the first of them.
    """
    exists = centroids.isfinite().all(-1)  # [heads clusters]
    units = F.normalize(vectors, dim=-1)
    # [batch heads clusters tokens]
    closeness = torch.einsum("bhtw,hcw->bhct", units, centroids.masked_fill(~exists[..., None], 0.0))
    closeness = closeness.masked_fill(~real[:, None, None, :], -torch.inf)  # [batch 1 1 tokens]
    numbers = torch.full(vectors.shape[:3], -1, dtype=torch.long, device=vectors.device)
    for row, length in enumerate(integers(real.sum(1))):
        taken = min(length, length // centroids.shape[1] + 1)
        nearest = closeness[row].topk(taken, dim=-1).indices  # [heads clusters taken]
        for cluster in reversed(range(centroids.shape[1])):
            # in descending order, so that the first centroid overwrites later ones
            own = torch.full_like(nearest[:, cluster], cluster).masked_fill_(~exists[:, cluster, None], -1)
            before = numbers[row].gather(-1, nearest[:, cluster])  # [heads taken]
            numbers[row].scatter_(-1, nearest[:, cluster], own.where(own >= 0, before))
    return numbers


def spherical_kmeans(
    points: Float[Tensor, "points width"], clusters: int, seed: int, iterations: int = 10
) -> Float[Tensor, "clusters width"]:
    """Spherical k-means: unit centroids of unit points by dot product.

    Rows of NaN fill the result if there are fewer distinct points than clusters.

    Source: Roy et al. 2021; ten iterations as in the authors' copy.
    """
    units = unique(F.normalize(points, dim=-1), dim=0)
    count = min(clusters, len(units))
    chosen = torch.randperm(len(units), generator=generator_for(seed, clusters))[:count]
    centres = units[chosen]
    every = F.normalize(points, dim=-1)
    for _ in range(iterations):
        owner = (every @ centres.T).argmax(-1)  # [points]
        sums = torch.zeros_like(centres).index_add_(0, owner, every)
        used = row_norm(sums)[:, 0] > 0
        centres = torch.where(used[:, None], F.normalize(sums, dim=-1), centres)  # [clusters 1]
    return F.pad(centres, (0, 0, 0, clusters - count), value=torch.nan)
