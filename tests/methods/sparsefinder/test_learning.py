"""Acceptance cases 4, 5, 21, 25 and 26: hand-computed losses, one optimiser step, and learning on synthetic data."""

from dataclasses import replace

import pytest
import torch

from graftwork.methods.sparsefinder import reference
from graftwork.methods.sparsefinder.buckets import cluster_sets, distances
from graftwork.methods.sparsefinder.clustering import fit_centroids
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import HeadBatch, SiteData, pad_heads
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, gold_edges, share_bucket
from graftwork.methods.sparsefinder.losses import fast_sum_hinge, projection_loss, sample_negatives
from graftwork.methods.sparsefinder.modules import Projection, SparsefinderAttention
from graftwork.methods.sparsefinder.phases import gold_and_allowed
from graftwork.metrics.sparsity import graph_counts


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None]


def flags(*rows):
    return torch.tensor([[cell == "1" for cell in row] for row in rows])[None, None]


A = (numbers(0, 1), numbers(0, 2), flags("10", "10"), 0.5)
B = (numbers(0, 0, 0, 0), numbers(0, 3, 1, 2), flags("1100", "1100", "1100", "1100"), 5.0)
E = (numbers(0, 0), numbers(0, 0.5), flags("11", "10"), 0.75)


def both(query, key, gold, allowed, seed):
    """Loss with a distance matrix, after comparing it with the loss without one.

    Args:
        query: Projected queries.
        key: Projected keys.
        gold: Gold pairs.
        allowed: Allowed pairs.
        seed: Seed of the negatives.
    """
    draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
    slow = projection_loss(distances(query, key, "l2"), gold, allowed, generator=draws[0])
    fast = fast_sum_hinge(query, key, gold, allowed, generator=draws[1])
    assert float(slow) == pytest.approx(float(fast))
    return float(slow)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("query", "key", "gold", "expected"), [A, B, E])
def test_losses_by_hand(query, key, gold, expected, seed):
    assert both(query, key, gold, torch.ones_like(gold), seed) == pytest.approx(expected)


@pytest.mark.parametrize(("second", "length", "expected"), [((0, 3, 0, 0), 2, 2.5), ((0, 0, 0, 0), 1, 5.0)])
def test_losses_of_a_batch_exclude_rows_without_contrast(second, length, expected):
    query, key, gold, _ = B
    shorter = torch.zeros_like(gold)
    shorter[..., :length, 0] = True
    allowed = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    allowed[1, :, length:] = allowed[1, :, :, length:] = False
    joined = torch.cat([query, torch.zeros_like(query)]), torch.cat([key, numbers(*second)]), torch.cat([gold, shorter])
    assert both(*joined, allowed, 0) == pytest.approx(expected)


def test_rows_that_are_all_gold_cost_nothing():
    query = numbers(0, 0)
    assert both(query, query, flags("11", "11"), flags("11", "11"), 0) == 0.0


def test_negatives_are_never_gold_padded_or_from_the_future():
    gold = flags("111100", "111100", "110000", "100000", "111111", "000000")
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        free = sample_negatives(gold, ~gold, generator)[0, 0]
        assert free.sum(1).tolist() == [2, 2, 2, 1, 0, 0]
        assert not (free & gold[0, 0]).any()
        causal = sample_negatives(gold & allowed, allowed & ~gold, generator)[0, 0]
        assert not causal.triu(1).any()
        assert causal.sum(1).tolist() == [0, 0, 1, 1, 0, 0]


def test_the_sum_hinge_agrees_with_the_reference():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    gold = torch.rand(1, 1, 8, 8, generator=generator) < 0.3
    everything = torch.ones_like(gold)
    negative = sample_negatives(gold, ~gold, torch.Generator().manual_seed(4))
    expected = reference.sum_hinge(distances(query, key, "l2")[0, 0], gold[0, 0], negative[0, 0])
    assert both(query, key, gold, everything, 4) == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["pair_hinge", "logistic"])
def test_other_losses_reduce_the_distance_of_gold_pairs(loss):
    query = torch.zeros(1, 1, 4, 2, requires_grad=True)
    key = torch.randn(1, 1, 4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gold = torch.eye(4, dtype=torch.bool)[None, None]
    value = projection_loss(distances(query, key, "l2"), gold, torch.ones_like(gold), loss=loss)
    value.backward()
    assert value > 0
    moved = distances(query - 0.05 * query.grad, key - 0.05 * key.grad, "l2")
    before = distances(query, key, "l2")
    assert (moved - before)[gold].mean() < (moved - before)[~gold].mean()


def test_one_step_of_adam_moves_every_weight_once():
    projection = Projection(2, 8, 4, None, seed=0)
    before = [parameter.detach().clone() for parameter in projection.parameters()]
    optimiser = torch.optim.Adam(projection.parameters(), lr=0.01)
    query = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    gold = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    fast_sum_hinge(projection(query), projection(query.flip(2)), gold, torch.ones_like(gold)).backward()
    torch.nn.utils.clip_grad_norm_(projection.parameters(), 1.0)
    optimiser.step()
    for parameter, old in zip(projection.parameters(), before, strict=True):
        assert (parameter - old).abs().max() <= 0.0101


def test_first_values_of_projections():
    projection = Projection(3, 64, 4, None, seed=1)
    assert projection.weights[0].shape == (3, 64, 4)
    assert 0.12 < projection.weights[0].abs().max() <= 0.125
    assert not projection.biases[0].any()
    assert len(list(Projection(3, 64, 4, 16, seed=1).parameters())) == 4


def toy_heads(seed):
    """Sentences whose queries and keys share four numbers per token, as acceptance case 25 describes them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    mixing = draw(2, 4, 16)
    pairs = []
    for _ in range(60):
        length = int(torch.randint(12, 41, (1,), generator=generator))
        hidden = draw(length, 4) @ mixing
        pairs.append((0.5 * (hidden + 0.3 * draw(2, length, 16)), 0.5 * (hidden + 0.3 * draw(2, length, 16))))
    return pairs


SITE = SiteData("toy", 2, 0.25, False, False)


def train_toy(pairs, seed):
    projection = Projection(2, 16, 4, None, seed=seed)
    optimiser = torch.optim.Adam(projection.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        for start in range(0, 54, 8):
            data = pad_heads(pairs[start : min(start + 8, 54)], SITE)
            allowed = data.allowed.expand(-1, 2, -1, -1)
            optimiser.zero_grad()
            loss = fast_sum_hinge(
                projection(data.query), projection(data.key), gold_of(data), allowed, generator=generator
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(projection.parameters(), 1.0)
            optimiser.step()
    return projection


def gold_of(data: HeadBatch):
    return gold_edges(data.query, data.key, data.mask, scale=SITE.scale, query_real=data.query_real)


def recall_and_sparsity(edges, data):
    ratios = graph_counts(edges, gold_of(data), data.allowed).ratios()
    return float(ratios["recall"].mean()), float(ratios["sparsity"].mean()), float(ratios["gold_sparsity"].mean())


@torch.no_grad()
def at_sparsity(values, data, wanted):
    """Graph of the smallest values at the given sparsity."""
    inside = values[data.allowed.expand_as(values)]
    return (values < inside.quantile(1 - wanted)) & data.allowed


def test_projections_beat_random_graphs_and_windows():
    pairs = toy_heads(0)
    projection = train_toy(pairs, 0)
    data = pad_heads(pairs[54:], SITE)
    query, key = projection(data.query).detach(), projection(data.key).detach()
    recall, sparsity, gold = recall_and_sparsity(at_sparsity(distances(query, key, "l2"), data, 0.6), data)
    assert 0.77 <= gold <= 0.86
    assert sparsity == pytest.approx(0.6, abs=0.05)
    assert recall >= 0.70
    noise = torch.rand(query.shape[0], 2, query.shape[2], key.shape[2], generator=torch.Generator().manual_seed(1))
    assert recall_and_sparsity(at_sparsity(noise, data, 0.6), data)[0] == pytest.approx(0.40, abs=0.05)
    windows = [
        recall_and_sparsity(Graph(2, data.mask, pattern=Pattern(w), query_real=data.query_real).dense(), data)[:2]
        for w in range(1, 40, 2)
    ]
    below = max((point for point in windows if point[1] <= 0.6), key=lambda point: point[1])
    above = min((point for point in windows if point[1] > 0.6), key=lambda point: point[1])
    share = (0.6 - below[1]) / (above[1] - below[1])
    assert 0.43 <= below[0] + share * (above[0] - below[0]) <= 0.55
    train = pad_heads(pairs[:54], SITE)
    points = torch.cat([projection(x).detach()[:, :, :40] for x in (train.query, train.key)], 2)
    real = torch.cat([train.query_real, train.key_real], 1)
    centroids = fit_centroids(
        torch.stack([points[:, head][real] for head in range(2)]), SparsefinderConfig(grouping="kmeans"), 3
    )
    edges = share_bucket(*(cluster_sets(x, centroids, 1, data.key_real) for x in (query, key)))
    recall, sparsity, _ = recall_and_sparsity(edges, data)
    assert 0.58 <= sparsity <= 0.68
    assert recall >= 0.55


def test_the_same_seed_gives_the_same_projections_and_centroids():
    pairs = toy_heads(1)
    first, second = train_toy(pairs, 3), train_toy(pairs, 3)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    points = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
    config = SparsefinderConfig(grouping="kmeans", num_clusters=5, cluster_rounds=2)
    assert torch.equal(*(fit_centroids(points, config, 5) for _ in range(2)))


@pytest.mark.parametrize("causal", [False, True])
def test_one_projection_of_both_learns_the_symmetric_closure(causal):
    """Acceptance case 21: an edge where either direction is gold, causality and padding applied again."""
    torch.manual_seed(5)
    site = replace(SITE, causal=causal)
    pairs = [(torch.randn(2, length, 16) * 2, torch.randn(2, length, 16)) for length in (9, 6)]
    data = pad_heads(pairs, site)
    config = SparsefinderConfig(grouping="kmeans", concat_q_and_k=True)
    graft = SparsefinderAttention(config, 2, 16, causal=causal, cross=False, number=0)
    gold = gold_edges(data.query, data.key, data.mask, scale=site.scale, query_real=data.query_real)
    found, allowed = gold_and_allowed(graft, data)
    if not causal:
        assert torch.equal(found, found.mT)
    assert (found & ~gold).any() or causal
    assert torch.equal(found, (gold | gold.mT) & allowed)
    assert not found[1, :, 6:].any()
    assert not found[1, :, :, 6:].any()
    if causal:
        assert not found.triu(1).any()
