"""Acceptance case 19: the executors agree with the reference and with each other, in outputs and in every gradient."""

from dataclasses import replace

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder import reference
from graftwork.methods.sparsefinder.executors import empty_rows, gathered_attention, masked_attention, sparse_attention
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, blocks_of
from graftwork.surgery.masks import LazyMask, PositionBias

CASES = [(seed, causal, left) for seed in range(3) for causal in (False, True) for left in (False, True)]


def example(seed, causal=False, left=False, dtype=torch.float32, unit=1):
    """Graph, query, key and value of two sentences of unequal length, with four heads over two groups.

    Buckets, edges, band and global tokens of the graph overlap.

    Args:
        seed: Seed of all tensors; also selects the pattern.
        causal: Use a causal mask.
        left: Pad on the left.
        dtype: Type of query, key and value.
        unit: Tokens per row and column of buckets and edges.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = 19
    position, lengths = torch.arange(tokens), torch.tensor([[19], [11]])
    padding = position >= tokens - lengths if left else position < lengths
    units = -(-tokens // unit)
    flags = [torch.rand(2, 4, units, 5, generator=generator) < 0.12 for _ in range(2)]
    edges = torch.rand(2, 4, units, units, generator=generator) < 0.03
    pattern = (Pattern(), Pattern(3, True, True), Pattern(2))[seed % 3]
    mask = LazyMask(2, tokens, tokens, causal=causal, padding=padding)
    graph = Graph(4, mask, *flags, edges, pattern, unit=unit, query_real=padding)
    query = torch.randn(2, 4, tokens, 6, generator=generator, dtype=dtype)
    key, value = (torch.randn(2, 2, tokens, 6, generator=generator, dtype=dtype) for _ in range(2))
    return graph, query, key, value


@pytest.mark.parametrize(("seed", "causal", "left"), CASES)
def test_all_executors_give_masked_entmax(seed, causal, left):
    graph, query, key, value = example(seed, causal, left)
    dense = graph.dense()
    expected = masked_attention(query, key, value, graph, scale=0.8)
    for head in (0, 3):
        slow = reference.attention(query[1, head], key[1, head // 2], value[1, head // 2], dense[1, head], scale=0.8)
        torch.testing.assert_close(expected[1, head], slow, rtol=0, atol=1e-5)
    for size in (4, 8, 64):
        found = gathered_attention(query, key, value, graph, scale=0.8, size=size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not (blocks_of(dense, size) & ~graph.coarse(size)).any()
    flexible = sparse_attention(query, key, value, graph, scale=0.8, executor="flex", block_size=8)
    torch.testing.assert_close(flexible, expected, rtol=0, atol=1e-5)
    empty = ~dense.any(-1)
    assert not expected[empty].any()
    assert torch.equal(empty_rows(graph, 5), (empty & graph.query_real[:, None]).sum(-1))


@pytest.mark.parametrize("alpha", [1.0, 1.3])
def test_softmax_and_other_alphas_run_on_the_same_graph(alpha):
    graph, query, key, value = example(1)
    expected = masked_attention(query, key, value, graph, scale=0.8, alpha=alpha)
    found = gathered_attention(query, key, value, graph, scale=0.8, alpha=alpha, size=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if alpha == 1.0:
        flexible = sparse_attention(query, key, value, graph, scale=0.8, alpha=1.0, executor="flex")
        torch.testing.assert_close(flexible, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("unit", [1, 4])
def test_gathered_gradients_are_those_of_the_dense_oracle(causal, unit):
    graph, *tensors = example(1, causal, dtype=torch.float64, unit=unit)
    outputs = []
    for run in (
        lambda *given: masked_attention(*given, graph, scale=0.8),
        lambda *given: gathered_attention(*given, graph, scale=0.8, size=4),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = run(*leaves)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        output.backward(upstream)
        outputs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gathered_attention_passes_the_gradient_check():
    graph, query, key, value = example(2, dtype=torch.float64)
    leaves = [x[:1, ...][..., :2].clone().requires_grad_() for x in (query, key, value)]
    mask = LazyMask(1, 19, 19, padding=graph.mask.padding[:1])
    parts = {"query_buckets": graph.query_buckets[:1], "key_buckets": graph.key_buckets[:1]}
    single = Graph(4, mask, **parts, pattern=Pattern(3))
    assert torch.autograd.gradcheck(
        lambda *given: gathered_attention(*given, single, scale=0.8, size=4).sum(1), leaves, fast_mode=True
    )


def test_whole_blocks_can_only_add_edges():
    graph, query, key, value = example(0)
    whole = Graph(4, graph.mask, edges=graph.coarse(4), unit=4, query_real=graph.query_real)
    found = gathered_attention(query, key, value, graph, scale=0.8, size=4, exact=False)
    torch.testing.assert_close(found, masked_attention(query, key, value, whole, scale=0.8), rtol=0, atol=1e-5)
    assert not (graph.dense() & ~whole.dense()).any()


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_whole_past_blocks_of_a_decoder_share_one_mask(alpha):
    """Blocks of 4 of 19 tokens: every query attends to its gathered blocks up to its own position."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 19, 6, generator=generator)
    key, value = (torch.randn(2, 2, 19, 6, generator=generator) for _ in range(2))
    chosen = torch.rand(2, 4, 5, 5, generator=generator) < 0.4
    mask = LazyMask(2, 19, 19, causal=True)
    for own in (True, False):
        # without the own block, the general masks are used
        blocks = chosen | torch.eye(5, dtype=torch.bool) if own else chosen & ~torch.eye(5, dtype=torch.bool)
        graph = Graph(4, mask, edges=blocks.repeat_interleave(4, 2)[:, :, :19], key_unit=4)
        expected = masked_attention(query, key, value, graph, scale=0.8, alpha=alpha)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = gathered_attention(
                    query.requires_grad_(grad), key, value, graph, scale=0.8, alpha=alpha, size=4, exact=False
                )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_position_bias_and_a_predicate_reach_gathered_blocks():
    graph, query, key, value = example(1)
    bias = PositionBias(torch.randn(4, 37), queries=19)
    mask = LazyMask(2, 19, 19, padding=graph.mask.padding, predicate=lambda b, h, q, k: (q - k).abs() < 6)
    narrow = replace(graph, mask=mask)
    expected = masked_attention(query, key, value, narrow, scale=0.8, bias=bias)
    found = gathered_attention(query, key, value, narrow, scale=0.8, size=4, bias=bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_flex_refuses_gradients_and_other_alphas():
    graph, query, key, value = example(0)
    with pytest.raises(ConfigError, match="no gradient"):
        sparse_attention(query.requires_grad_(), key, value, graph, scale=1.0, executor="flex")
    with pytest.raises(ConfigError, match=r"alpha is 1\.3"), torch.no_grad():
        sparse_attention(query, key, value, graph, scale=1.0, alpha=1.3, executor="flex")


def test_no_tensor_of_queries_times_keys_is_made():
    tokens, size = 1024, 16
    mask = LazyMask(1, tokens, tokens)
    query = torch.randn(1, 1, tokens, 8, requires_grad=True)
    graph = Graph(1, mask, pattern=Pattern(3))
    from graftwork.metrics.cost import saved_tensors

    with saved_tensors() as saved:
        gathered_attention(query, query, query, graph, scale=1.0, size=size)
    assert saved.shapes
    # three blocks of keys for every query, and gathered copies of keys and values
    assert saved.bytes < 20 * tokens * 4 * size * 4 < tokens * tokens * 4 * 2
