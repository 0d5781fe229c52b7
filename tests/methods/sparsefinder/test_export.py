"""Exported graphs: round trips, and equality of FlexAttention with the exported BlockMask."""

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.export import block_lists, bsr_graph, csr_graph, flex_block_mask, graph_from_lists
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, blocks_of
from graftwork.surgery.masks import LazyMask

TOKENS = 48


def graph_of(kind, causal):
    generator = torch.Generator().manual_seed(3)
    mask = LazyMask(2, TOKENS, TOKENS, causal=causal)
    pattern = Pattern(5, first=True)
    if kind == "blocks":
        return Graph(4, mask, edges=torch.rand(2, 4, 6, 6, generator=generator) < 0.3, pattern=pattern, unit=8)
    if kind == "key blocks":
        edges = torch.rand(2, 4, TOKENS, 6, generator=generator) < 0.3
        return Graph(4, mask, edges=edges, pattern=pattern, key_unit=8)
    flags = [torch.rand(2, 4, TOKENS, 70, generator=generator) < 0.02 for _ in range(2)]
    return Graph(4, mask, *flags, pattern=pattern)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["blocks", "key blocks", "buckets"])
def test_exports_return_as_the_same_graph(kind, causal):
    graph = graph_of(kind, causal)
    dense = graph.dense()
    for size in (8, 16):
        lists = block_lists(graph, size)
        assert torch.equal(lists.blocks(), blocks_of(dense, size))
        full = dense.unflatten(3, (-1, size)).unflatten(2, (-1, size)).all(5).all(3)
        assert int(lists.full_block_cnt.sum()) == int(full.sum())
        back = graph_from_lists(lists, graph)
        assert not (dense & ~back.dense()).any()
        assert torch.equal(block_lists(back, size).blocks(), lists.blocks())
        exported = flex_block_mask(graph, size)
        assert torch.equal(exported.to_dense().bool(), blocks_of(dense, size))
        positions = [torch.arange(count) for count in (2, 4, TOKENS, TOKENS)]
        pairs = exported.mask_mod(*torch.meshgrid(*positions, indexing="ij"))
        assert torch.equal(pairs, dense)
    for row, head in ((0, 0), (1, 3)):
        assert torch.equal(csr_graph(graph, row, head).to_dense().bool(), dense[row, head])
        blocks = bsr_graph(graph, row, head, 16)
        assert torch.equal(blocks.to_dense().bool(), dense[row, head])
        assert blocks.crow_indices()[-1] == blocks_of(dense, 16)[row, head].sum()


def test_flex_attention_with_the_exported_mask_is_masked_softmax():
    graph = graph_of("key blocks", True)
    query, key, value = (torch.randn(2, 4, TOKENS, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = flex_attention(query, key, value, block_mask=flex_block_mask(graph, 16))
    scores = (query @ key.mT * 8**-0.5).masked_fill(~graph.dense(), -torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1) @ value, rtol=0, atol=1e-5)


def test_a_length_that_no_block_divides_is_refused_for_bsr_and_partial_for_lists():
    graph = Graph(1, LazyMask(1, 20, 20), pattern=Pattern(39))
    with pytest.raises(ConfigError, match="Expected a divisor"):
        bsr_graph(graph, 0, 0, 16)
    lists = block_lists(graph, 16)
    assert lists.blocks().all()
    assert lists.full_block_cnt.flatten().tolist() == [1, 0]
