"""Patterns of other papers to compare with, each from its paper, with private generators, one sentence at a time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A private generator; the same numbers give the same draws, whatever else the process draws."""
    state = seed & 0xFFFFFFFF
    for number in numbers:
        state = (state * 1_000_003 + number + 1) & 0x7FFFFFFFFFFF
    return torch.Generator().manual_seed(state)


def random_edges(heads: int, queries: int, keys: int, density: float, seed: int) -> Bool[Tensor, "heads queries keys"]:
    """An independent coin for every pair, which depends on its head and positions alone.

    So the graph of a longer sentence begins with that of a shorter one, and decoding token by token sees the same.
    """
    head = torch.arange(heads)[:, None, None]
    query, key = torch.arange(queries)[None, :, None], torch.arange(keys)[None, None, :]
    state = (head * 73_856_093) ^ (query * 19_349_663) ^ (key * 83_492_791) ^ (seed * 2_654_435_761 & 0x7FFFFFFF)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B56C4E9)):
        # a mixing function of 32 bits, kept in 64
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    return (state.double() / 2**32) < density


def bigbird_edges(
    heads: int, length: int, random_keys: int, seed: int, *, reference_plan: bool = False
) -> Bool[Tensor, "heads queries keys"]:
    """Band of three, first and last token global, and R random keys for every other row.

    Source: Zaheer et al. 2020 at block size 1. Differs from the authors' copy, whose plan for R keys takes them from
    the first 2R + 5 columns (`reference_plan`); a short sentence gets fewer random keys.
    """
    position = torch.arange(length)
    edges = (position[:, None] - position[None, :]).abs() <= 1
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
    """The diagonal, and g tokens that are connected with all, 2 ≤ g ≤ max(2, M − 1); one draw for all heads.

    Source: Beltagy et al. 2020 with random global tokens. Differs from the authors' copy: drawn without replacement,
    and from real tokens only.
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
    """Own stride window and summary columns, the fixed pattern; causality is applied by whoever masks.

    Source: Child et al. 2019, fixed attention; a summary is `summary` + 1 columns wide and ends at a multiple of the
    stride. A stride of at most `summary` makes every column a summary.
    """
    column, row = torch.arange(keys)[None, :], torch.arange(queries)[:, None]
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
) -> Tensor:
    """Bucket of each position under random rotations of [query; key]: argmax of [xR, −xR].

    Source: Kitaev et al. 2020. Differs from the authors' copy: a private generator, the same rotation in every call.

    Returns:
        Bucket numbers [batch heads tokens hashes].

    Raises:
        ConfigError: If the number of buckets is odd, or queries and keys are not of the same positions.
    """
    if buckets % 2 or buckets < 2:
        raise ConfigError(f"Found {buckets} buckets. Expected an even number from 2 for reformer.")
    if query.shape != key.shape:
        raise ConfigError(
            "Found queries and keys of other positions (cross-attention, or one new token). reformer hashes both of a "
            "position together; use another grouping."
        )
    joined = torch.cat([query, key], dim=-1)
    generator = generator_for(seed, buckets, hashes)
    shape = (query.shape[1], hashes, joined.shape[-1], buckets // 2)
    rotations = torch.randn(shape, generator=generator).to(joined)
    rotated = torch.einsum("bhtw,hrwc->bhtrc", joined, rotations)
    return torch.cat([rotated, -rotated], dim=-1).argmax(-1)


def routing_buckets(
    vectors: Float[Tensor, "batch heads tokens width"],
    centroids: Float[Tensor, "heads clusters width"],
    real: Bool[Tensor, "batch tokens"],
) -> Tensor:
    """Cluster of each token when every centre takes its n // C + 1 nearest tokens; −1 for those that none takes.

    Source: Roy et al. 2021. Differs from the authors' copy: n counts real tokens only. A token that several centres
    take stays with the first.

    Returns:
        Cluster numbers [batch heads tokens].
    """
    exists = centroids.isfinite().all(-1)
    units = F.normalize(vectors, dim=-1)
    closeness = torch.einsum("bhtw,hcw->bhct", units, centroids.masked_fill(~exists[..., None], 0.0))
    closeness = closeness.masked_fill(~real[:, None, None, :], -torch.inf)
    numbers = torch.full(vectors.shape[:3], -1, dtype=torch.long, device=vectors.device)
    for row, length in enumerate(real.sum(1).tolist()):
        taken = min(length, length // centroids.shape[1] + 1)
        nearest = closeness[row].topk(taken, dim=-1).indices
        for cluster in reversed(range(centroids.shape[1])):
            # from the last to the first, so that the first centre has the last word
            own = torch.full_like(nearest[:, cluster], cluster).masked_fill_(~exists[:, cluster, None], -1)
            before = numbers[row].gather(-1, nearest[:, cluster])
            numbers[row].scatter_(-1, nearest[:, cluster], own.where(own >= 0, before))
    return numbers


def spherical_kmeans(points: Float[Tensor, "points width"], clusters: int, seed: int, iterations: int = 10) -> Tensor:
    """Unit centres of unit points by dot product; fewer distinct points than clusters leave rows of NaN.

    Source: Roy et al. 2021; ten iterations as in the authors' copy.
    """
    units = torch.unique(F.normalize(points, dim=-1), dim=0)
    count = min(clusters, len(units))
    chosen = torch.randperm(len(units), generator=generator_for(seed, clusters))[:count]
    centres = units[chosen]
    every = F.normalize(points, dim=-1)
    for _ in range(iterations):
        owner = (every @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, owner, every)
        used = sums.norm(dim=-1) > 0
        centres = torch.where(used[:, None], F.normalize(sums, dim=-1), centres)
    return F.pad(centres, (0, 0, 0, clusters - count), value=torch.nan)
