"""Tokens sorted by bucket: the attention of the unsorted order, from fewer blocks."""

from dataclasses import replace

import pytest
import torch

import graftwork as gw
from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.executors import gathered_attention, masked_attention, sparse_attention
from graftwork.methods.sparsefinder.graphs import Graph, Pattern
from graftwork.methods.sparsefinder.modules import observe_calls, sparsefinder_modules
from graftwork.methods.sparsefinder.sorting import is_sortable, sort_graph, sorted_attention
from graftwork.surgery.masks import LazyMask
from tiny_models import padded_batch, tiny_model

PATTERNS = (Pattern(), Pattern(5, True, True), Pattern(2), Pattern(None, True), Pattern(4, False, True))
CASES = [(causal, left, pattern) for causal in (False, True) for left in (False, True) for pattern in PATTERNS]


def example(causal, left, pattern, *, step=0, dtype=torch.float32, several=False):
    """Graph, query, key and value of two sentences; `step` queries at the end of the keys, all of them for 0.

    Every token is in one bucket, or in several or none.
    """
    generator = torch.Generator().manual_seed(causal + 2 * left + 4 * PATTERNS.index(pattern))
    tokens, lengths = 21, torch.tensor([[21], [13]])
    position = torch.arange(tokens)
    padding = position >= tokens - lengths if left else position < lengths
    if several:
        flags = [torch.rand(2, 4, tokens, 5, generator=generator) < 0.3 for _ in range(2)]
    else:
        flags = [
            torch.nn.functional.one_hot(torch.randint(0, 5, (2, 4, tokens), generator=generator), 5).bool()
            for _ in range(2)
        ]
    queries = step or tokens
    mask = LazyMask(2, queries, tokens, causal=causal, query_offset=tokens - queries, padding=padding)
    graph = Graph(4, mask, flags[0][:, :, -queries:], flags[1], None, pattern, query_real=padding[:, -queries:])
    query = torch.randn(2, 4, queries, 6, generator=generator, dtype=dtype)
    key, value = (torch.randn(2, 2, tokens, 6, generator=generator, dtype=dtype) for _ in range(2))
    return graph, query, key, value


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("causal", "left", "pattern"), CASES)
def test_sorted_tokens_have_the_attention_of_the_given_order(causal, left, pattern, several):
    for step in (0, 6):
        graph, query, key, value = example(causal, left, pattern, step=step, several=several)
        for alpha in (1.5, 1.0, torch.tensor([1.2, 1.5, 1.8, 1.3])):
            expected = masked_attention(query, key, value, graph, scale=0.8, alpha=alpha)
            for size in (4, 64):
                found = sorted_attention(query, key, value, graph, scale=0.8, alpha=alpha, size=size)
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_gradients_are_those_of_the_given_order(pattern):
    graph, *tensors = example(True, True, pattern, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    found, expected = (
        torch.autograd.grad(attend(*leaves, graph, scale=0.8).square().sum(), leaves)
        for attend in (sorted_attention, masked_attention)
    )
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_of_one_cluster_share_blocks(causal):
    """Sixteen clusters of 16 scattered tokens: with blocks of 16 every cluster is one block after sorting."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(256) % 16
    flags = torch.nn.functional.one_hot(
        torch.stack([cluster[torch.randperm(256, generator=generator)] for _ in range(3)]), 16
    ).bool()[None]
    graph = Graph(3, LazyMask(1, 256, 256, causal=causal), flags, flags)
    assert float(graph.coarse(16).sum()) > 3 * (100 if causal else 200)
    assert int(sort_graph(graph).coarse(16).sum()) == 3 * 16
    query, key, value = (torch.randn(1, 3, 256, 4, generator=generator) for _ in range(3))
    attend = {"scale": 0.5, "block_size": 16, "executor": "blocks"}
    torch.testing.assert_close(
        sparse_attention(query, key, value, graph, sort=True, **attend),
        sparse_attention(query, key, value, graph, **attend),
        rtol=0,
        atol=1e-5,
    )


def test_auto_looks_at_the_blocks_after_sorting():
    """Scattered clusters keep every block, so that only sorted tokens are worth gathering."""
    from graftwork.methods.sparsefinder.executors import BLOCKS_FROM, chosen_executor

    flags = torch.nn.functional.one_hot(torch.arange(BLOCKS_FROM) % 16, 16).bool()[None, None]
    graph = Graph(1, LazyMask(1, BLOCKS_FROM, BLOCKS_FROM), flags, flags)
    assert chosen_executor(graph) == "dense"
    assert chosen_executor(graph, sort=True) == "blocks"


def test_graphs_of_edges_and_of_blocks_are_not_sorted():
    graph, query, key, value = example(False, False, PATTERNS[0])
    for other in (replace(graph, unit=2), replace(graph, edges=torch.ones(2, 4, 21, 21, dtype=torch.bool))):
        assert not is_sortable(other)
        with pytest.raises(ConfigError, match="without buckets of single tokens"):
            sort_graph(other)
    with pytest.raises(ConfigError, match="position bias"):
        sparse_attention(query, key, value, graph, scale=1.0, executor="blocks", bias=torch.zeros(1), sort=True)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_with_sorted_tokens_is_the_unsorted_model(name):
    batch, outputs, graphs = padded_batch(name), [], []
    for sort in (False, True):
        settings = {"grouping": "kmeans", "num_clusters": 4, "skip_projectors": True, "window_size": 3}
        method = gw.Sparsefinder(**settings, executor="blocks", attention_block_size=4, sort_tokens=sort)
        model = gw.convert(tiny_model(name, dtype=torch.float32), method).model.eval()
        for graft in sparsefinder_modules(model).values():
            graft.centroids.copy_(torch.randn(graft.centroids.shape, generator=torch.Generator().manual_seed(1)))
            graft.active.fill_(True)
        with (
            torch.no_grad(),
            observe_calls(model, lambda graft, call: graphs.append(graft.current_graph(call))),
        ):
            outputs.append(model(**batch).logits)
        if name == "llama":
            prompt = {"input_ids": batch["input_ids"][:1, -6:], "max_new_tokens": 5, "do_sample": False}
            answers = [model.generate(**prompt, use_cache=cached) for cached in (False, True)]
            assert torch.equal(*answers)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs[1][real], outputs[0][real], rtol=0, atol=2e-5)
    # the graphs leave out pairs and are sorted
    assert all(is_sortable(graph) and not graph.dense()[:1].all() for graph in graphs)
    assert any((sort_graph(graph).order.query.diff(dim=-1) < 0).any() for graph in graphs)


def test_blocks_of_an_unsorted_order_are_as_before():
    graph, query, key, value = example(True, False, PATTERNS[1])
    torch.testing.assert_close(
        gathered_attention(query, key, value, graph, scale=0.8, size=4),
        sorted_attention(query, key, value, graph, scale=0.8, size=4),
        rtol=0,
        atol=1e-5,
    )
