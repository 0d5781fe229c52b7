"""One attention layer along a graph of blocks: each executor against dense entmax with the same solver, and SDPA.

In candidates named "predicted", the graph is predicted in the measured call: projections of blocks (section 3.10),
nearest cluster, a band of three blocks. In all others it is random with a fixed number of key blocks per query block.
Expected: gathering does kept / all of the work of dense entmax with the same solver, at twice the speed per score,
because its scores stay in the cache. SDPA, a fused softmax kernel, is about four times cheaper per score, so
gathering is faster if it keeps less than a quarter of the blocks.

    python benchmarks/sparsefinder_attention.py --lengths 1024 2048 4096 --kept 0.125
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common import Report, measure, parser, prepare, random
from graftwork.methods.sparsefinder.buckets import cluster_sets
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.executors import gathered_attention
from graftwork.methods.sparsefinder.flex import flex_attention
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, block_vectors
from graftwork.surgery.masks import LazyMask


def random_blocks(heads: int, length: int, size: int, kept: float, seed: int) -> Graph:
    """Random block graph with the same number of key blocks for every query block.

    Args:
        heads: Number of heads.
        length: Number of tokens.
        size: Tokens per block.
        kept: Share of key blocks.
        seed: Seed of the graph.
    """
    blocks = -(-length // size)
    noise = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    edges = torch.zeros_like(noise, dtype=torch.bool)
    edges.scatter_(-1, noise.topk(max(1, round(kept * blocks))).indices, True)
    return Graph(heads, LazyMask(1, length, length), edges=edges, unit=size)


def predicted(query: Tensor, key: Tensor, weight: Tensor, centroids: Tensor, size: int) -> Graph:
    """Graph of clustered block vectors, with a band of three blocks.

    Args:
        query: Queries [1 heads tokens width].
        key: Keys [1 heads tokens width].
        weight: Projection [heads width 4].
        centroids: Centroids [heads 1 clusters joined] of block vectors.
        size: Tokens per block.
    """
    mask = LazyMask(1, query.shape[2], key.shape[2])
    real = torch.ones(1, query.shape[2], dtype=torch.bool, device=query.device)
    with torch.no_grad():
        sets = [cluster_sets(block_vectors(x @ weight, real, size)[0], centroids, 1) for x in (query, key)]
    return Graph(query.shape[1], mask, sets[0], sets[1], pattern=Pattern(3), unit=size)


def dense(query: Tensor, key: Tensor, value: Tensor, solver: str) -> Tensor:
    """Dense entmax attention of query, key and value [1 heads tokens width]."""
    return entmax((query * query.shape[-1] ** -0.5) @ key.mT, solver=solver) @ value


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--head-size", type=int, default=64)
    options.add_argument("--block-size", type=int, default=64)
    options.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.125, 0.03], help="shares of blocks")
    options.add_argument("--dense-limit", type=int, default=2048, help="length up to which dense entmax runs too")
    options.add_argument("--clusters", type=int, default=16, help="more clusters predict fewer blocks")
    options.add_argument("--flex", action="store_true", help="also FlexAttention, compiled; forward only")
    options.add_argument("--no-backward", dest="backward", action="store_false", default=True)
    chosen = options.parse_args()
    prepare(chosen)
    baseline = "SDPA"
    report = Report("Attention along a graph of blocks", chosen, baseline)
    for length in chosen.lengths:
        leaves = [random(1, chosen.heads, length, chosen.head_size, options=chosen) for _ in range(3)]
        scale, size = chosen.head_size**-0.5, chosen.block_size
        weight = random(chosen.heads, chosen.head_size, 4, options=chosen).detach() * scale
        centroids = random(chosen.heads, 1, chosen.clusters, 4 * size, options=chosen).detach()
        forwards = {baseline: lambda leaves=leaves: F.scaled_dot_product_attention(*leaves)}
        if length <= chosen.dense_limit:
            # sorting is much slower on long rows
            for solver in ("newton", "sort") if length <= 1024 else ("newton",):
                forwards[f"dense entmax, {solver}"] = lambda leaves=leaves, solver=solver: dense(*leaves, solver)
        for kept in chosen.kept:
            graph = random_blocks(chosen.heads, length, size, kept, chosen.seed)
            forwards[f"gathered, {kept:g} of the blocks"] = lambda leaves=leaves, graph=graph, scale=scale, size=size: (
                gathered_attention(*leaves, graph, scale=scale, size=size)
            )
            if chosen.flex and not chosen.backward:
                forwards[f"flex, {kept:g} of the blocks"] = lambda leaves=leaves, graph=graph, scale=scale, size=size: (
                    flex_attention(*leaves, graph, scale=scale, alpha=1.5, size=size, compiled=True)
                )

        def with_prediction(
            leaves: list[Tensor] = leaves,
            weight: Tensor = weight,
            centroids: Tensor = centroids,
            scale: float = scale,
            size: int = size,
        ) -> Tensor:
            graph = predicted(leaves[0], leaves[1], weight, centroids, size)
            return gathered_attention(*leaves, graph, scale=scale, size=size)

        share = predicted(leaves[0], leaves[1], weight, centroids, size).coarse(size).float().mean()
        forwards[f"predicted and gathered, {float(share):.3f} of the blocks"] = with_prediction
        report.add(f"{length} tokens", measure(forwards, leaves, baseline, chosen, backward=chosen.backward))
    report.show()


if __name__ == "__main__":
    main()
