"""Timed graphs: every row has the quality of the graph that was timed, and the run's own graph is the first."""

import entmax
import pytest
import torch

from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import QueriesKeys
from graftwork.methods.sparsefinder.graph_report.costs import executor_costs
from graftwork.methods.sparsefinder.graph_report.quality import graph_quality
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, gold_pairs
from graftwork.methods.sparsefinder.modules import SparsefinderAttention
from graftwork.methods.sparsefinder.stored import INDEX_FILE, SiteData, write_index, write_shard
from graftwork.surgery.masks import LazyMask


def heads(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, 2, tokens, 8, generator=generator) * 2 for _ in range(2))


def blocks_with_an_edge(edges, size):
    """Definition of kept blocks: a loop over blocks."""
    rows = -(-edges.shape[-1] // size)
    return sum(
        bool(head[i * size : (i + 1) * size, j * size : (j + 1) * size].any())
        for head in edges
        for i in range(rows)
        for j in range(rows)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_quality_is_that_of_the_dense_definition(causal):
    query, key = heads(300)
    graph = Graph(2, LazyMask(1, 300, 300, causal=causal), pattern=Pattern(9, first=True))
    found = graph_quality(query, key, graph, scale=0.3, alpha=1.5)
    allowed = torch.ones(300, 300).tril().bool() if causal else torch.ones(300, 300).bool()
    scores = (query[0].double() * 0.3) @ key[0].double().mT
    weights = entmax.entmax15(scores.masked_fill(~allowed, -1e9), dim=-1)
    gold, edges = weights > 0, graph.dense()[0]
    assert found.recall == pytest.approx(float(((edges & gold).sum((1, 2)) / gold.sum((1, 2))).mean()), rel=1e-3)
    assert found.mass == pytest.approx(float((weights * edges).sum(-1).mean()), rel=1e-5)
    assert found.sparsity == pytest.approx(float(1 - edges.sum() / (2 * allowed.sum())), rel=1e-6)
    for size, share in found.kept_blocks.items():
        possible = blocks_with_an_edge(allowed[None], size)
        assert share == pytest.approx(blocks_with_an_edge(edges, size) / (2 * possible))


def test_gold_of_softmax_is_the_smallest_set_with_the_mass():
    weights = torch.tensor([[0.5, 0.02, 0.3, 0.18], [0.96, 0.01, 0.02, 0.01], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]])
    expected = [[True, False, True, True], [True, False, False, False], [True] * 4, [False] * 4]
    assert gold_pairs(weights, softmax=True).tolist() == expected
    assert gold_pairs(torch.tensor([[0.9, 0.1, 0.0]]), softmax=False).tolist() == [[True, True, False]]


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_first_row_is_the_graph_of_the_run_with_its_own_quality(tmp_path, causal):
    config = SparsefinderConfig(grouping="distance", threshold=2.0, window_size=3)
    graft = SparsefinderAttention(config, 2, 8, causal=causal, cross=False, number=0)
    graft.active.fill_(True)
    pairs = [tuple(x[0] for x in heads(40, seed)) for seed in range(3)]
    write_shard(tmp_path, 0, [[pair] for pair in pairs], half=False)
    write_index(tmp_path / INDEX_FILE, {}, [SiteData("x", 2, 8**-0.5, causal, False, 1.5)], 3)
    stored = QueriesKeys(tmp_path)
    rows = executor_costs(graft, stored, stored, 0, [96])
    own = rows[0]
    assert (own.label, own.graph, own.executor, own.length) == (
        "own graph (distance), prediction included",
        "own graph (distance)",
        "dense",
        96,
    )
    assert own.kept is None, "all scores are computed below the length at which blocks are gathered"
    query, key = (torch.cat([pair[place] for pair in pairs], 1)[None, :, :96] for place in (0, 1))
    mask = LazyMask(1, 96, 96, causal=causal)
    graph = graft.graph(query, key, mask)
    expected = graph_quality(query, key, graph, scale=8**-0.5, alpha=1.5)
    assert (own.recall, own.mass, own.sparsity) == (expected.recall, expected.mass, expected.sparsity)
    assert (own.kept_64, own.kept_16) == (expected.kept_blocks[64], expected.kept_blocks[16])
    other = next(row for row in rows if row.graph not in (None, own.graph))
    assert other.graph == ("band of 12.5% of the keys" if causal else "distance of 64-token blocks")
    assert other.recall != own.recall
    gathered = next(row for row in rows if row.executor == "blocks")
    assert gathered.kept == gathered.kept_64, "the share of allowed blocks, not of all"
