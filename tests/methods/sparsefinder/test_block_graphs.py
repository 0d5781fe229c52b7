"""Graphs of key blocks: the definition by loops, padding, executors, the learned gate, and the choice of executor."""

import math

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.block_graphs import Gate, predict_blocks
from graftwork.methods.sparsefinder.block_scores import gate_loss, pool_keys
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.executors import chosen_executor, gathered_attention, masked_attention
from graftwork.methods.sparsefinder.extraction import pad_heads
from graftwork.methods.sparsefinder.flex import flex_attention
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, blocks_of
from graftwork.methods.sparsefinder.modules import SparsefinderAttention
from graftwork.methods.sparsefinder.phases import _gate_loss
from graftwork.methods.sparsefinder.stored import SiteData
from graftwork.surgery.masks import LazyMask

TOKENS = 22


def example(seed=0, groups=2):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, TOKENS, 6, generator=generator)
    key, value = (torch.randn(2, groups, TOKENS, 6, generator=generator) for _ in range(2))
    return query, key, value


def settings(grouping="mean_pooled", **changes):
    return SparsefinderConfig(grouping=grouping, **{"block_size": 4, "block_budget": 0.4, **changes})


def by_loops(config, query, key, causal):
    """Token graph of one head and one sentence without padding, by the definition."""
    unit, count = config.block_size, query.shape[0]
    blocks = -(-count // unit)
    parts = [slice(block * unit, (block + 1) * unit) for block in range(blocks)]
    graph = torch.zeros(count, count, dtype=torch.bool)

    def estimate(own, block):
        keys = key[parts[block]]
        if config.grouping == "pages":
            return float(torch.maximum(own * keys.amax(0), own * keys.amin(0)).sum())
        return float(own @ keys.mean(0))

    for row in range(count):
        home = row // unit
        allowed = list(range(home + 1)) if causal else list(range(blocks))
        own = query[row] if causal else query[parts[home]].mean(0)
        forced = {home} if causal else set()
        if config.window_size:
            rows = [row] if causal else range(home * unit, (home + 1) * unit)
            near = {
                (r + d) // unit
                for r in rows
                for d in range(1 - (config.window_size + 1) // 2, config.window_size // 2 + 1)
            }
            forced |= near & set(allowed)
        if config.add_cls_mask:
            forced.add(0)
        wanted = max(math.ceil(config.block_budget * len(allowed) - 1e-9), len(forced))
        ranked = sorted(set(allowed) - forced, key=lambda block, own=own: -estimate(own, block))
        for block in [*forced, *ranked][:wanted]:
            graph[row, parts[block]] = True
    if config.add_cls_mask:
        graph[: unit if not causal else 1] = True
    return graph.tril() if causal else graph


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grouping", ["mean_pooled", "pages"])
@pytest.mark.parametrize("fixed", [{}, {"window_size": 5}, {"add_cls_mask": True}])
def test_the_graph_is_the_definition(grouping, causal, fixed):
    config = settings(grouping, **fixed)
    query, key, _ = example()
    mask = LazyMask(2, TOKENS, TOKENS, causal=causal)
    graph = predict_blocks(config, query, key, mask, gate=None, cross=False, query_real=None)
    dense = graph.dense()
    for head in range(4):
        expected = by_loops(config, query[1, head], key[1, head // 2], causal)
        assert torch.equal(dense[1, head], expected)
    for size in {graph.gathered_size(given) for given in (2, 4, 8)}:
        assert torch.equal(graph.coarse(size), blocks_of(dense, size))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal, left):
    config = settings(window_size=3)
    query, key, _ = example()
    length = 13
    alone = predict_blocks(
        config,
        *(x[:1, :, :length] for x in (query, key)),
        LazyMask(1, length, length, causal=causal),
        gate=None,
        cross=False,
        query_real=None,
    ).dense()[0]
    start = TOKENS - length if left else 0
    position = torch.arange(TOKENS)
    padding = ((position >= start) & (position < start + length))[None].repeat(2, 1)
    padding[1] = True
    moved = [torch.full_like(x, 9.0) for x in (query, key)]
    for each, original in zip(moved, (query, key), strict=True):
        each[0, :, start : start + length] = original[0, :, :length]
        each[1] = original[1]
    mask = LazyMask(2, TOKENS, TOKENS, causal=causal, padding=padding)
    found = predict_blocks(config, *moved, mask, gate=None, cross=False, query_real=padding)
    inside = slice(start, start + length)
    assert torch.equal(found.dense()[0][:, inside, inside], alone)
    expected = masked_attention(moved[0], moved[1], moved[1], found, scale=0.5)
    for size in (4, 8):
        gathered = gathered_attention(moved[0], moved[1], moved[1], found, scale=0.5, size=size)
        torch.testing.assert_close(gathered, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("causal", [False, True])
def test_executors_agree_on_block_graphs(alpha, causal):
    query, key, value = example(1)
    mask = LazyMask(2, TOKENS, TOKENS, causal=causal)
    graph = predict_blocks(settings(), query, key, mask, gate=None, cross=False, query_real=None)
    expected = masked_attention(query, key, value, graph, scale=0.7, alpha=alpha)
    for size in {graph.gathered_size(given) for given in (2, 4, 8, 64)}:
        found = gathered_attention(query, key, value, graph, scale=0.7, alpha=alpha, size=size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found = flex_attention(query, key, value, graph, scale=0.7, alpha=alpha, size=graph.gathered_size(4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_later_query_chooses_as_in_the_whole_sequence():
    query, key, _ = example()
    config = settings()
    whole = predict_blocks(
        config, query, key, LazyMask(2, TOKENS, TOKENS, causal=True), gate=None, cross=False, query_real=None
    ).dense()
    for last in (3, 4, 17):
        mask = LazyMask(2, 1, last + 1, causal=True, query_offset=last)
        part = predict_blocks(
            config, query[:, :, last : last + 1], key[:, :, : last + 1], mask, gate=None, cross=False, query_real=None
        )
        assert torch.equal(part.dense()[:, :, 0], whole[:, :, last, : last + 1])


def test_gate_loss_is_the_divergence_by_hand():
    logits = torch.tensor([[[[0.0, math.log(3.0), 5.0], [1.0, 2.0, 3.0]]]])
    mass = torch.tensor([[[[0.2, 0.2, 0.6], [0.0, 0.0, 1.0]]]])
    candidate = torch.tensor([[[[True, True, False], [True, True, False]]]])
    # softmax over the candidates (1/4, 3/4) against (1/2, 1/2); the second row has no mass in candidates
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(gate_loss(logits, mass, candidate)) == pytest.approx(expected, rel=1e-5)


def test_a_trained_gate_keeps_more_mass_than_mean_pooling():
    torch.manual_seed(0)
    config = SparsefinderConfig(grouping="gate", block_size=4, block_budget=0.35, rounds=4, alpha=1.0)
    graft = SparsefinderAttention(config, 2, 8, causal=True, cross=False, number=0)

    def sentence():
        key = torch.randn(2, 48, 8)
        # a large shared coordinate that mean pooling follows and the queries ignore in sum
        return torch.randn(2, 48, 8) * torch.tensor([3.0, 3, 1, 1, 0.1, 0.1, 0.1, 0.1]), key * 1.5

    site = SiteData("x", 2, 1.0, True, False, 1.0)
    train, test = (pad_heads([sentence() for _ in range(count)], site) for count in (24, 12))

    def mass(config, gate):
        graph = predict_blocks(config, test.query, test.key, test.mask, gate=gate, cross=False, query_real=None)
        scores = (test.query @ test.key.mT).masked_fill(~test.allowed, -torch.inf)
        return float((scores.softmax(-1) * graph.dense()).sum(-1).mean())

    optimiser = torch.optim.Adam(graft.parameters(), lr=0.03)
    with torch.no_grad():
        first = float(_gate_loss(graft, train))
    for _ in range(60):
        optimiser.zero_grad()
        loss = _gate_loss(graft, train)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.8 * first
    with torch.no_grad():
        gate = Gate(graft.query_projection, graft.key_projection)
        found = mass(config, gate)
        pooled = mass(settings("mean_pooled", block_budget=0.35), None)
    assert found > pooled + 0.01


def test_auto_looks_at_the_kept_blocks():
    mask = LazyMask(1, 2048, 2048)
    band = Graph(1, mask, pattern=Pattern(65))
    assert chosen_executor(band) == "blocks"
    everything = Graph(1, mask, pattern=Pattern(4095))
    assert chosen_executor(everything) == "dense"
    assert chosen_executor(Graph(1, LazyMask(1, 512, 512), pattern=Pattern(3))) == "dense"
    assert chosen_executor(Graph(1, LazyMask(1, 8192, 8192), pattern=Pattern(16383))) == "blocks"
    assert chosen_executor(everything, "flex") == "flex"


def test_pooled_keys_ignore_padding():
    key = torch.tensor([[[[1.0], [3.0], [-5.0], [99.0]]]])
    pooled = pool_keys(key, torch.tensor([[True, True, True, False]]), 2)
    assert pooled.mean.flatten().tolist() == [2.0, -5.0]
    assert pooled.high.flatten().tolist() == [3.0, -5.0]
    assert pooled.low.flatten().tolist() == [1.0, -5.0]


def test_settings_of_blocks_are_checked():
    with pytest.raises(ConfigError, match="Expected tokens per block"):
        SparsefinderConfig(grouping="mean_pooled")
    with pytest.raises(ConfigError, match="block_budget is 0"):
        settings(block_budget=0.0)
    with pytest.raises(ConfigError, match="separate projections"):
        settings("gate", share_projectors=True)
    mask = LazyMask(1, 1, 8, causal=True, query_offset=12, key_offset=5)
    query, key, _ = example()
    with pytest.raises(ConfigError, match="rolling cache"):
        predict_blocks(settings(), query, key, mask, gate=None, cross=False, query_real=None)
