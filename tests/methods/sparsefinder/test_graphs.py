"""Acceptance cases 6 to 15 and 20 to 24: buckets, patterns, metrics, baselines and blocks, by hand where given."""

import numpy as np
import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder import baselines, buckets, reference
from graftwork.methods.sparsefinder.clustering import kmeans
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, blocks_of, gold_edges, share_bucket, unfold
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.metrics.sparsity import (
    GraphCounts,
    graph_counts,
    hypervolume,
    pack_edges,
    packed_counts,
    pareto_frontier,
)
from graftwork.surgery.masks import LazyMask


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None]


def real(tokens, length=None):
    return (torch.arange(tokens) < (tokens if length is None else length))[None]


def edges_of(pattern, tokens, *, causal=False, length=None, batch=1):
    """Edges of a pattern under a mask.

    Args:
        pattern: Fixed pattern.
        tokens: Number of queries and keys.
        causal: Use a causal mask.
        length: Lengths of the sentences without padding.
        batch: Number of sentences if no lengths are given.
    """
    padding = None if length is None else torch.arange(tokens)[None] < torch.tensor(length).view(-1, 1)
    mask = LazyMask(batch if length is None else len(padding), tokens, tokens, causal=causal, padding=padding)
    return Graph(1, mask, pattern=pattern, query_real=padding).dense()


def sparsity(edges, causal=False):
    tokens = edges.shape[-1]
    return 1 - float(edges.sum()) / (tokens * (tokens + 1) / 2 if causal else tokens**2)


def test_fixed_bins_hold_equal_counts():
    values = column(*range(10))
    assert buckets.fixed_bins(values, real(10), 4).flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert not buckets.fixed_bins(values, real(10), 10).any()
    equal = buckets.fixed_bins(column(*[1.0] * 8), real(8), 4)
    assert equal.flatten().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    flags = buckets.one_hot_sets(equal, 2)
    assert sparsity(share_bucket(flags, flags)) == 0.5


def test_dynamic_bins_hold_equal_widths_whatever_the_padding():
    ten = column(-3, -0.5, -0.1, 0, 0.1, 0.3, 0.4, 0.5, 1, 3)
    assert buckets.dynamic_bins(ten, real(10), 4).flatten().tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    eight = (-0.9, -0.5, -0.1, 0, 0.1, 0.3, 0.4, 0.9)
    alone = buckets.dynamic_bins(column(*eight), real(8), 4)
    padded = buckets.dynamic_bins(column(*eight, *[0.0] * 24), real(32, 8), 4)
    assert alone.flatten().tolist() == padded.flatten()[:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(set(buckets.dynamic_bins(column(*[0.3] * 9), real(9), 3).flatten().tolist())) == 1


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_bins_agree_with_the_reference(size):
    values = torch.randn(11, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    given = values[None, None, :, None]
    assert buckets.fixed_bins(given, real(11), size).flatten().tolist() == reference.fixed_bins(values, size)
    assert buckets.dynamic_bins(given, real(11), size).flatten().tolist() == reference.dynamic_bins(values, size)


@pytest.mark.parametrize("name", ["cos", "euclidean", "l2", "direction", "minkowski", "min", "min_norm"])
def test_distance_thresholds_zero_and_infinity(name):
    points = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    distance = buckets.distances(points, points, name)
    assert not buckets.nearer_than(distance, 0.0).any()
    assert buckets.nearer_than(distance, float("inf")).all()


def test_squared_and_plain_distance_thresholds_correspond():
    q, k = torch.randn(2, 1, 2, 30, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    squared, plain = buckets.distances(q, k, "l2"), buckets.distances(q, k, "euclidean")
    assert torch.equal(buckets.nearer_than(squared, 1.0), buckets.nearer_than(plain, 1.0))
    assert torch.equal(buckets.nearer_than(squared, 4.0), buckets.nearer_than(plain, 2.0))


def test_thresholds_for_another_number_of_heads_are_refused():
    with pytest.raises(ConfigError, match=r"3 thresholds.*each of 2 heads"):
        buckets.nearer_than(torch.zeros(1, 2, 3, 3), torch.ones(3))


def test_top_clusters_are_sets():
    centres = torch.tensor([[[[0.0], [10.0], [20.0]]]])
    q, k = column(1, 9).float(), column(1, 11).float()

    def graph(top):
        return share_bucket(buckets.cluster_sets(q, centres, top), buckets.cluster_sets(k, centres, top))[0, 0]

    assert graph(1).tolist() == [[True, False], [False, True]]
    assert graph(2).all()
    assert graph(3).all()
    with pytest.raises(ConfigError, match="top_clusters is 4 of 3"):
        graph(4)
    for number, value in enumerate((1.0, 9.0)):
        flags = buckets.cluster_sets(q, centres, 2)[0, 0, number]
        assert set(flags.nonzero().flatten().tolist()) == reference.nearest_clusters(
            torch.tensor([value]), centres[0, 0], 2
        )


def test_degenerate_clusters():
    equal = kmeans(torch.ones(20, 3), 4, run=0)
    assert int(equal.isfinite().all(-1).sum()) == 1
    points = torch.ones(1, 1, 5, 3)
    flags = buckets.cluster_sets(points, equal[None, None], 2)
    assert share_bucket(flags, flags).all()
    few = kmeans(torch.tensor([[0.0], [1.0], [1.0]]), 5, run=0)
    assert int(few.isfinite().all(-1).sum()) == 2
    # queries in one cluster, keys in the other: every row is empty
    centres = torch.tensor([[[[0.0], [10.0]]]])
    config = SparsefinderConfig(grouping="kmeans", num_clusters=2)
    graph = predict_graph(config, column(0, 1).float(), column(9, 10).float(), LazyMask(1, 2, 2), Learned(centres))
    assert not graph.dense().any()


def test_windows_have_the_edges_of_the_specification():
    assert int(edges_of(Pattern(3), 6).sum()) == 16
    assert not edges_of(Pattern(), 6).any()
    assert torch.equal(edges_of(Pattern(1), 6)[0, 0], torch.eye(6, dtype=torch.bool))
    row = edges_of(Pattern(4), 6)[0, 0, 2]
    assert row.tolist() == [False, True, True, True, True, False]
    assert edges_of(Pattern(11), 6).all()
    for pattern, expected in (
        (Pattern(11), 0.978630),
        (Pattern(11, first=True), 0.974770),
        (Pattern(11, first=True, last=True), 0.970917),
    ):
        assert sparsity(edges_of(pattern, 512)) == pytest.approx(expected, abs=1e-6)


def test_causal_patterns():
    assert sparsity(edges_of(Pattern(1), 4, causal=True), causal=True) == pytest.approx(0.6)
    assert sparsity(edges_of(Pattern(1, first=True), 4, causal=True), causal=True) == pytest.approx(0.3)
    for window in (1, 4, 9):
        assert not edges_of(Pattern(window, True, True), 7, causal=True)[0, 0].triu(1).any()


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_patterns_agree_with_the_reference(window, causal):
    expected = reference.final_graph(
        torch.zeros(6, 6, dtype=torch.bool), window=window, first=True, last=window > 2, causal=causal
    )
    found = edges_of(Pattern(window or None, True, window > 2), 6, causal=causal)[0, 0]
    assert torch.equal(found, expected)


def test_the_last_token_is_the_last_real_one():
    graph = edges_of(Pattern(last=True), 6, length=[4])[0, 0]
    assert graph[3, :4].all()
    assert graph[:4, 3].all()
    assert not graph[4:].any()
    assert not graph[:, 4:].any()


def counts(predicted, gold, allowed=None):
    shape = (1, 1, *gold.shape)
    allowed = torch.ones(shape, dtype=torch.bool) if allowed is None else allowed
    return graph_counts(predicted.view(shape), gold.view(shape), allowed)


def matrix(*rows):
    return torch.tensor([[bool(int(cell)) for cell in row] for row in rows])


def test_metrics_of_the_worked_example():
    predicted, gold = matrix("100", "011", "111"), matrix("110", "010", "101")
    ratios = counts(predicted, gold).ratios()
    expected = {"recall": 0.8, "precision": 2 / 3, "sparsity": 1 / 3, "gold_sparsity": 4 / 9, "exact": 2 / 3}
    for name, value in expected.items():
        assert float(ratios[name]) == pytest.approx(value)
        assert reference.graph_metrics(predicted, gold)[name] == pytest.approx(value)


def test_macro_and_micro_averages_and_an_empty_prediction():
    gold = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    gold[0] = True
    gold[1, 0] = torch.eye(3, dtype=torch.bool)
    predicted = torch.zeros_like(gold)
    predicted[0] = True
    allowed = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    both = graph_counts(predicted, gold, allowed)
    assert float(both.ratios()["recall"]) == 0.5
    assert float(both.ratios(micro=True)["recall"]) == 0.75
    nothing = counts(torch.zeros(3, 3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)).ratios()
    found = {name: float(value) for name, value in nothing.items()}
    assert (found["recall"], found["precision"], found["sparsity"], found["empty_rows"]) == (0, 0, 1, 1)


def test_packed_counts_are_the_counts():
    generator = torch.Generator().manual_seed(0)
    predicted, gold = (torch.rand(3, 2, 7, 11, generator=generator) < share for share in (0.4, 0.2))
    allowed = (torch.rand(3, 1, 7, 11, generator=generator) < 0.9).clone()
    allowed[1, :, 4:] = False
    expected = graph_counts(predicted, gold, allowed)
    found = packed_counts(*(pack_edges(x) for x in (predicted, gold & allowed, allowed)))
    for name in GraphCounts.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_pareto_frontier_and_area():
    points = [(0.9, 0.5), (0.8, 0.7), (0.8, 0.6), (0.7, 0.65), (0.6, 0.9)]
    assert pareto_frontier(points) == [(0.6, 0.9), (0.8, 0.7), (0.9, 0.5)]
    assert hypervolume(points, 0.6, 0.9) == pytest.approx(0.2 * 0.7 + 0.1 * 0.5)


METHODS = {
    "distance": {"threshold": 1.0},
    "quantize": {"bucket_size": 4},
    "dynamic": {"bucket_size": 4, "same_size": False},
    "kmeans": {"num_clusters": 4},
    "window": {"window_size": 3},
    "random": {"threshold": 0.4},
    "bigbird": {},
    "longformer": {"baseline_size": 6},
    "openai_sparse": {},
    "reformer": {},
    "routing": {"num_clusters": 3},
}


def prediction(name, query, key, lengths):
    tokens = query.shape[2]
    padding = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
    config = SparsefinderConfig(grouping=name if name != "dynamic" else "quantize", **METHODS[name])
    generator = torch.Generator().manual_seed(9)
    learned = Learned(centroids=torch.randn(2, 1, config.num_clusters, 4, generator=generator))
    mask = LazyMask(len(lengths), tokens, tokens, padding=padding)
    return predict_graph(config, query, key, mask, learned, query_real=padding).dense()


@pytest.mark.parametrize("name", METHODS)
def test_the_graph_of_a_sentence_does_not_depend_on_its_neighbours(name):
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(3, 2, 14, 4, generator=generator) for _ in range(2))
    lengths = [14, 9, 5]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    together = prediction(name, query, key, lengths)
    for row, length in enumerate(lengths):
        alone = prediction(name, query[row : row + 1, :, :length], key[row : row + 1, :, :length], [length])
        assert torch.equal(together[row, :, :length, :length], alone[0])
        assert not together[row, :, length:].any()
        assert not together[row, :, :, length:].any()
    reverse = prediction(name, query.flip(0), key.flip(0), lengths[::-1])
    assert torch.equal(reverse.flip(0), together)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_sentence_of_one_token_is_all_or_nothing(name):
    graph = prediction(name, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), [1])
    assert graph.shape == (1, 2, 1, 1)


def test_openai_sparse_is_the_fixed_pattern():
    edges = baselines.openai_sparse_edges(12, 12, 4)
    summaries = {2, 3, 4, 6, 7, 8, 10, 11}
    for row in range(12):
        window = range(5) if row <= 4 else range(4, 9) if row <= 8 else range(8, 12)
        assert set(edges[row].nonzero().flatten().tolist()) == summaries | set(window)
    assert baselines.openai_sparse_edges(12, 12, 2).all()


def test_bigbird_rows_have_band_globals_and_random_keys():
    spread = baselines.bigbird_edges(1, 512, 3, seed=0)[0]
    planned = baselines.bigbird_edges(1, 512, 3, seed=0, reference_plan=True)[0]
    for row in range(3, 509):
        fixed = {0, 511, row - 1, row, row + 1}
        for edges in (spread, planned):
            found = set(edges[row].nonzero().flatten().tolist())
            assert fixed <= found
            assert len(found - fixed) == 3 or row < 12
    others = [key for row in range(12, 500) for key in planned[row].nonzero().flatten().tolist()]
    assert {key for key in others if others.count(key) > 50} <= set(range(1, 10)) | {0, 511}
    assert len({key for row in range(12, 500) for key in spread[row].nonzero().flatten().tolist()}) > 400


def test_longformer_with_two_globals_and_reformer_with_odd_buckets():
    edges = baselines.longformer_edges(20, 2, seed=3)
    assert int(edges.all(1).sum()) == int(edges.all(0).sum()) == 2
    hashed = prediction("reformer", *torch.randn(2, 1, 2, 10, 4), [10])
    assert torch.equal(hashed, hashed.mT)
    assert hashed.diagonal(dim1=-2, dim2=-1).all()
    with pytest.raises(ConfigError, match="even number"):
        SparsefinderConfig(grouping="reformer", baseline_size=5)


def test_block_graphs_hold_every_token_edge():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.rand(1, 2, 12, 12, generator=generator) < 0.1
    tokens[..., 9:, :] = tokens[..., :, 9:] = False
    blocks = blocks_of(tokens, 4)
    for i in range(3):
        for j in range(3):
            expected = tokens[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].any(-1).any(-1)
            assert torch.equal(blocks[:, :, i, j], expected)
    assert not (tokens & ~unfold(blocks, 4)).any()
    assert torch.equal(blocks_of(tokens, 1), tokens)


def test_cross_attention_counts_its_own_pairs():
    query_real = torch.arange(5)[None] < torch.tensor([[5], [3]])
    key_real = torch.arange(7)[None] < torch.tensor([[7], [6]])
    mask = LazyMask(2, 5, 7, padding=key_real)
    config = SparsefinderConfig(grouping="quantize", bucket_size=3)
    query, key = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 7, 4)
    graph = predict_graph(config, query, key, mask, Learned(), cross=True, query_real=query_real).dense()
    allowed = mask.dense() & query_real[:, None, :, None]
    found = graph_counts(graph, allowed, allowed)
    assert found.pairs.flatten().tolist() == [35, 18]
    assert ((found.ratios()["recall"] >= 0) & (found.ratios()["recall"] <= 1)).all()


@pytest.mark.parametrize("pattern", [Pattern(1), Pattern(4), Pattern(7, first=True), Pattern(None, True, True)])
@pytest.mark.parametrize(("unit", "left"), [(1, 0), (1, 5), (2, 0)])
def test_the_pattern_of_blocks_is_that_of_their_tokens(pattern, unit, left):
    """By definition: a block is connected where any pair inside is; lengths that no block divides."""
    padding = torch.ones(2, 23, dtype=torch.bool)
    padding[1, :left] = False
    mask = LazyMask(2, 23, 23, padding=padding)
    graph = Graph(1, mask, pattern=pattern, unit=unit)
    # without the mask, which the coarse graph applies by whole blocks only
    bare = graph.pattern_rows(0, 23, "cpu")
    assert torch.equal(graph.coarse_pattern(4, (6, 6), "cpu").expand(2, 1, 6, 6), blocks_of(bare, 4).expand(2, 1, 6, 6))


@pytest.mark.parametrize("causal", [False, True])
def test_gold_edges_are_the_pairs_of_the_definition_for_groups_of_heads(causal):
    draw = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 9, 5, dtype=torch.float64, generator=draw)
    key = torch.randn(2, 2, 9, 5, dtype=torch.float64, generator=draw)
    mask = LazyMask(2, 9, 9, causal=causal)
    found = gold_edges(query, key, mask, scale=0.7)
    for row in range(2):
        for head in range(4):
            expected = reference.gold_graph(query[row, head], key[row, head // 2], scale=0.7, causal=causal)
            assert torch.equal(found[row, head], expected)
    moved = gold_edges(query, key, mask, scale=0.7, bias=torch.full((1, 1, 9, 9), 5.0, dtype=torch.float64))
    assert torch.equal(moved, found)  # a constant moves no support
