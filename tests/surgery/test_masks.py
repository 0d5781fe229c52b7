"""Lazy masks and position biases equal the dense tensors that they describe."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.attention import mask_function
from graftwork.surgery.masks import LazyMask, PositionBias, allowed_by, key_padding
from graftwork.surgery.position_bias import BiasByDistance
from tiny_models import tiny_model


def loop(mask):
    """The mask by its definition, one entry at a time."""
    dense = torch.zeros(mask.batch, 1, mask.queries, mask.keys, dtype=torch.bool)
    for batch in range(mask.batch):
        for row in range(mask.queries):
            for column in range(mask.keys):
                query, key = row + mask.query_offset, column + mask.key_offset
                allowed = not mask.causal or key <= query
                allowed &= mask.padding is None or bool(mask.padding[batch, column])
                allowed &= mask.predicate is None or bool(
                    mask.predicate(*(torch.tensor(index) for index in (batch, 0, query, key)))
                )
                dense[batch, 0, row, column] = allowed
    return dense


PADDING = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
WINDOW = and_masks(causal_mask_function, sliding_window_overlay(3))
PACKED = packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]]))
MASKS = {
    "all": LazyMask(2, 6, 6),
    "causal": LazyMask(2, 6, 6, causal=True),
    "padded": LazyMask(2, 4, 6, padding=PADDING),
    "causal padded": LazyMask(2, 6, 6, causal=True, padding=PADDING),
    "cached": LazyMask(2, 2, 6, causal=True, query_offset=4),
    "one token": LazyMask(2, 1, 6, causal=True, query_offset=5, padding=PADDING),
    "static cache": LazyMask(2, 2, 6, causal=True, query_offset=1),
    "rolling cache": LazyMask(2, 2, 6, causal=True, query_offset=7, key_offset=3, padding=PADDING),
    "window": LazyMask(2, 6, 6, predicate=WINDOW),
    "packed": LazyMask(2, 6, 6, causal=True, predicate=PACKED),
    "packed by vmap": LazyMask(2, 6, 6, causal=True, predicate=PACKED, vectorised=True),
    "everything": LazyMask(2, 6, 6, causal=True, predicate=PACKED, padding=PADDING),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dense_is_the_definition(mask):
    assert mask.dense().shape == mask.shape
    assert torch.equal(mask.dense(), loop(mask))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_blocks_of_rows_and_keys_are_parts_of_the_whole(mask, rows):
    for start in range(0, mask.queries, rows):
        stop = min(mask.queries, start + rows)
        for width in (1, 3, mask.keys):
            block = mask.block(start, stop, width)
            expected = loop(mask)[:, :, start:stop, :width]
            assert bool(expected.all()) if block is None else torch.equal(block.expand_as(expected), expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_no_query_attends_to_keys_beyond_the_visible_ones(mask):
    for stop in range(1, mask.queries + 1):
        visible = mask.visible(stop)
        assert not loop(mask)[:, :, :stop, visible:].any()
        if mask.causal and mask.padding is None and mask.predicate is None and visible:
            assert loop(mask)[0, 0, stop - 1, visible - 1]


def test_blocks_without_masked_pairs_are_none():
    assert LazyMask(2, 6, 6).block(0, 6) is None
    assert LazyMask(2, 1, 6, causal=True, query_offset=5).block(0, 1) is None
    assert LazyMask(2, 6, 6, causal=True).block(5, 6) is None


def test_transformers_recognises_a_lazy_mask_as_prepared():
    mask = MASKS["causal padded"]
    assert mask.ndim == 4
    assert mask.contiguous() is mask
    assert torch.equal(mask.to("cpu").dense(), mask.dense())
    assert mask_function(2, 6, 6, attention_mask=mask) is mask


def test_padding_masks_without_padding_are_dropped():
    assert mask_function(2, 3, 3, attention_mask=torch.ones(2, 3)).padding is None


def test_padding_shorter_than_the_cache_is_filled_with_masked_keys():
    mask = mask_function(1, 1, 5, q_offset=torch.tensor(2), attention_mask=torch.ones(1, 3))
    assert mask.padding.tolist() == [[True, True, True, False, False]]
    assert mask.query_offset == 2


def test_padding_is_cut_to_the_keys_of_a_rolling_cache():
    padding = torch.tensor([[0, 1, 1, 0, 1]])
    assert mask_function(1, 1, 3, q_offset=4, kv_offset=1, attention_mask=padding).padding.tolist() == [
        [True, True, False]
    ]


@pytest.mark.parametrize(("queries", "keys", "past"), [(7, 7, 0), (1, 9, 8), (3, 9, 6)])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_position_bias_is_that_of_t5(stack, queries, keys, past):
    owner = getattr(tiny_model("t5"), stack).block[0].layer[0].SelfAttention
    expected = owner.compute_bias(queries, keys, past_seen_tokens=past)
    tensor = BiasByDistance(owner)(queries, keys, past_seen_tokens=past)
    assert tensor.shape == (1, 2, 1, queries + keys - 1)
    bias = PositionBias.of(tensor, queries, keys)
    assert torch.equal(bias.block(0, queries, keys), expected)
    assert torch.equal(bias.block(queries - 1, queries, keys - 1), expected[:, :, -1:, :-1])
    assert expected.std() > 0


def test_the_gradient_of_a_position_bias_reaches_the_table():
    owner = tiny_model("t5").encoder.block[0].layer[0].SelfAttention
    PositionBias.of(BiasByDistance(owner)(5, 5), 5, 5).block(0, 5, 5).sum().backward()
    assert owner.relative_attention_bias.weight.grad.sum() == 5 * 5 * 2


def test_single_pairs_of_a_position_bias_are_those_of_the_dense_bias():
    bias = PositionBias(torch.randn(3, 9), queries=4)
    head, query, key = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij")
    assert torch.equal(bias.at(head, query, key), bias.block(0, 4, 6)[0])


def test_cross_attention_has_no_bias():
    owner = tiny_model("t5").decoder.block[0].layer[1].EncDecAttention
    assert PositionBias.of(BiasByDistance(owner)(3, 5), 3, 5) is None


def test_a_dense_bias_stays_a_tensor():
    dense = torch.randn(1, 2, 3, 5)
    assert PositionBias.of(dense, 3, 5) is dense
    assert PositionBias.of(None, 3, 5) is None


LARGE = [-1e4, -1e9, -65504.0, torch.finfo(torch.float32).min, -torch.inf]


@pytest.mark.parametrize("number", LARGE)
@pytest.mark.parametrize("rows", [1, 6])
def test_padding_is_read_from_additive_masks_with_any_large_number(number, rows):
    additive = torch.zeros(2, 1, rows, 6).masked_fill(~PADDING[:, None, None, :], number)
    assert torch.equal(key_padding(additive), PADDING)
    assert torch.equal(key_padding(additive[:, 0]), PADDING)
    assert torch.equal(allowed_by(additive), PADDING[:, None, None, :].expand(2, 1, rows, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [-1e4, -65504.0, -torch.inf])
def test_padding_is_read_from_additive_masks_in_half_precision(number, dtype):
    additive = torch.zeros(2, 1, 1, 6, dtype=dtype).masked_fill(~PADDING[:, None, None, :], number)
    assert torch.equal(key_padding(additive), PADDING)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padding_is_read_from_masks_of_ones_and_zeros(dtype):
    assert torch.equal(key_padding(PADDING.to(dtype)), PADDING)
    assert torch.equal(key_padding(PADDING[:, None, None, :].expand(2, 1, 6, 6)), PADDING)


def test_padding_is_read_from_an_additive_mask_of_two_axes():
    assert torch.equal(key_padding(torch.zeros(2, 6).masked_fill(~PADDING, -1e4)), PADDING)


def test_biases_of_ordinary_size_forbid_nothing():
    assert allowed_by(torch.tensor([0.0, -4000.0, 3.0])).all()


@pytest.mark.parametrize("number", LARGE)
def test_masks_under_which_queries_attend_to_different_keys_are_refused(number):
    causal = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), number)
    for mask in (causal, allowed_by(causal), LazyMask(2, 6, 6, causal=True)):
        with pytest.raises(UnsupportedModelError, match="attend to different keys"):
            key_padding(mask)
