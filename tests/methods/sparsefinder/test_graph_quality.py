"""Timed graphs: every row has the quality of the graph that was timed, and the run's own graph is the first."""

from types import SimpleNamespace

import entmax
import pytest
import torch

from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import QueriesKeys
from graftwork.methods.sparsefinder.graph_report import costs
from graftwork.methods.sparsefinder.graph_report.costs import executor_costs, sorting_findings
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


def test_kept_blocks_are_counted_before_and_after_sorting_by_cluster(tmp_path, monkeypatch):
    # the times are of no interest here
    cost = SimpleNamespace(seconds=1.0, time_ratio=1.0, peak_bytes=0, low=1.0, high=1.0)
    monkeypatch.setattr(costs, "compare_costs", lambda candidates, *_, **options: dict.fromkeys(candidates, cost))
    config = SparsefinderConfig(grouping="kmeans", num_clusters=6, skip_projectors=True)
    graft = SparsefinderAttention(config, 2, 8, causal=False, cross=False, number=0)
    graft.centroids.copy_(torch.randn(graft.centroids.shape, generator=torch.Generator().manual_seed(0)))
    graft.active.fill_(True)
    pairs = [tuple(x[0] for x in heads(128, seed)) for seed in range(2)]
    write_shard(tmp_path, 0, [[pair] for pair in pairs], half=False)
    write_index(tmp_path / INDEX_FILE, {}, [SiteData("x", 2, 8**-0.5, False, False, 1.5)], 2)
    stored = QueriesKeys(tmp_path)
    rows = executor_costs(graft, stored, stored, 0, [256])
    query, key = (torch.cat([pair[place] for pair in pairs], 1) for place in (0, 1))
    nearest = [torch.cdist(points, graft.centroids[:, 0]).argmin(-1) for points in (query, key)]  # [heads tokens]
    edges = nearest[0][:, :, None] == nearest[1][:, None, :]
    ordered = torch.stack(
        [head[a.sort().indices][:, b.sort().indices] for head, a, b in zip(edges, *nearest, strict=True)]
    )
    own = rows[0]
    for size, before, after in ((64, own.kept_64, own.sorted_64), (16, own.kept_16, own.sorted_16)):
        total = 2 * (256 // size) ** 2
        assert before == pytest.approx(blocks_with_an_edge(edges, size) / total)
        assert after == pytest.approx(blocks_with_an_edge(ordered, size) / total)
        assert after < before
    both = {row.label: row.kept for row in rows if "blocks in" in row.label and not row.backward}
    assert both == {
        "own graph (kmeans), blocks in given order, prediction included": own.kept_64,
        "own graph (kmeans), blocks in sorted order, prediction included": own.sorted_64,
    }
    (text,) = sorting_findings(rows)
    assert f"{own.kept_64:.3f} of the 64-token blocks, and {own.sorted_64:.3f}" in text
