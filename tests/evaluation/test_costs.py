"""Cost measurement of converted models, on the shipped encoder-decoder."""

import logging

import pytest
import torch

import graftwork as gw
from graftwork.demo import shipped_model
from graftwork.evaluation.costs import FORWARD_ROUNDS, measure_costs, sharing_copy
from graftwork.grafting.conversion import restore


@pytest.fixture
def loaded():
    return gw.load(shipped_model("encoder_decoder"), dtype="float32")


def test_a_sharing_copy_shares_parameters_but_no_modules(loaded):
    copy = sharing_copy(loaded.model)
    gw.convert(copy, gw.TopK(feed_forward_k=4, attention_k=4))
    assert [id(p) for p in copy.parameters()] == [id(p) for p in loaded.model.parameters()]
    assert not any("TopK" in type(module).__name__ for module in loaded.model.modules())
    assert loaded.model.config._attn_implementation != copy.config._attn_implementation
    restore(copy)
    ids = torch.tensor([[5, 6, 7]])
    expected = loaded.model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(copy(input_ids=ids, decoder_input_ids=ids).logits, expected)


def test_costs_are_measured_against_the_dense_model(loaded):
    topk = gw.convert(sharing_copy(loaded.model), gw.TopK(feed_forward_k=8, attention_k=8)).model
    rows = measure_costs({"dense": loaded.model, "topk": topk}, [256])
    for row in rows:
        low, high = row.forward_range
        assert 0 < low <= row.forward_seconds <= high
        assert row.rounds == FORWARD_ROUNDS
    assert [(row.label, row.length) for row in rows] == [("dense", 256), ("topk", 256)]
    assert rows[1].saved_bytes < rows[0].saved_bytes
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_every_variant_keeps_its_training_mode(loaded):
    topk = gw.convert(sharing_copy(loaded.model), gw.TopK(feed_forward_k=8)).model.train()
    measure_costs({"dense": loaded.model, "topk": topk}, [8])
    assert (loaded.model.training, topk.training) == (False, True)


def test_lengths_beyond_the_position_limit_are_skipped_with_a_warning(caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with caplog.at_level(logging.WARNING):
        rows = measure_costs({"dense": model}, [8, 32])
    assert [row.length for row in rows] == [8]
    assert "16 positions" in caplog.text
