"""Acceptance case 30 at test size: gathered blocks need a fraction of the time and memory of dense entmax."""

import torch

from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.executors import gathered_attention
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.metrics.cost import saved_tensors
from graftwork.surgery.masks import LazyMask

SCALE = 0.125


def eighth(length, size=64):
    blocks = length // size
    noise = torch.rand(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(0))
    edges = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, noise.topk(blocks // 8).indices, True)
    return Graph(1, LazyMask(1, length, length), edges=edges, unit=size)


def saved_bytes(run, *leaves):
    with saved_tensors(leaves) as record:
        run()
    return record.bytes


def test_what_is_kept_for_the_backward_pass_is_linear_in_length_and_below_half_of_dense():
    kept = []
    for length in (1024, 2048):
        leaves = [torch.randn(1, 1, length, 64).requires_grad_() for _ in range(3)]
        blocks = length // 64
        # four key blocks for every query block, whatever the length
        edges = torch.zeros(1, 1, blocks, blocks, dtype=torch.bool)
        for offset in range(4):
            edges |= torch.eye(blocks, dtype=torch.bool).roll(offset, 1)
        graph = Graph(1, LazyMask(1, length, length), edges=edges, unit=64)
        kept.append(saved_bytes(lambda g=graph, x=leaves: gathered_attention(*x, g, scale=SCALE, size=64), *leaves))
    assert kept[1] < 2.2 * kept[0]
    dense = saved_bytes(lambda: entmax((leaves[0] * SCALE) @ leaves[1].mT, solver="newton") @ leaves[2], *leaves)
    assert kept[1] < 0.5 * dense
