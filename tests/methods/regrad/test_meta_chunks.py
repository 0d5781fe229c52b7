"""Chunks of passages: the meta-gradient is that of one graph, and the memory that of one chunk."""

from __future__ import annotations

import pytest
import torch

from adapted_models import adapted_llama, relative
from graftwork.errors import ConfigError
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.functional import IGNORED_LABEL
from graftwork.methods.regrad.meta_training import chunks as chunking
from graftwork.methods.regrad.meta_training.chunks import Chunks, passage_bytes
from graftwork.methods.regrad.meta_training.learning import meta_gradients
from graftwork.methods.regrad.phases import Meta
from graftwork.metrics.fake_tensors import is_fake
from graftwork.metrics.memory import MemoryRecorder

OWNERS = [0, 0, 0, 1, 2, 2, 2]
LENGTHS = [9, 30, 17, 24, 5, 40, 30]


def unequal_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    """Three questions with three, one and three passages of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    documents = torch.randint(3, 128, (len(OWNERS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < lengths[:, None]).long()
    ids = torch.randint(3, 128, (3, 14), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.where(torch.arange(14) >= 10, IGNORED_LABEL),
        "document_ids": documents * mask,
        "document_mask": mask,
        "document_task": torch.tensor(OWNERS),
    }


def assert_same(found, expected, tolerance=1e-6):
    for name in ("adapter", "step_sizes", "loss", "inner_loss", "gradient_norm", "update_ratio"):
        assert relative(getattr(found, name), getattr(expected, name)) < tolerance, name


@pytest.mark.parametrize("order", [1, 2])
# norms and softmax of the model are in float32 in both cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_meta_gradients_of_chunks_equal_those_of_one_graph(dtype, tolerance, order):
    batch = unequal_batch()
    settings = {"initial_step_size": 0.5, "step_size_mode": "full"}
    model = adapted_llama(settings=settings, dtype=dtype, attention="sdpa").to(dtype)
    expected = meta_gradients(model, batch, order=order)
    for size in (1, 2, 3):
        parts = Chunks(size, order).of(model, batch)
        assert len(parts) == -(-len(OWNERS) // size)
        assert_same(meta_gradients(model, batch, order=order, chunks=parts), expected, tolerance)
    if order == 2:
        first = meta_gradients(model, batch, order=1)
        # the second-order term is not negligible here
        assert relative(first.adapter, expected.adapter) > 0.01


def test_gradient_checkpointing_changes_no_gradient_of_chunks():
    batch = unequal_batch()
    expected = meta_gradients(adapted_llama(settings={"initial_step_size": 0.5}), batch)
    model = adapted_llama(settings={"initial_step_size": 0.5}).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = meta_gradients(model, batch, chunks=Chunks(3, 2).of(model, batch))
    # three chunks, twice each and recomputed, and the question
    assert len(calls) > 3 * 2 + 1
    assert_same(found, expected)


@pytest.mark.parametrize(("layers", "times"), [(None, 3 + 1), ("0-3", 2 * 3 + 1), ("1,3", 3 + 1)])
def test_layers_below_the_adapter_are_computed_once_for_each_chunk(layers, times):
    batch = unequal_batch()
    model = adapted_llama(settings={"initial_step_size": 0.5, "layers": layers})
    expected = meta_gradients(model, batch)
    lower = model.model.layers[0]
    calls = []
    lower.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found = meta_gradients(model, batch, chunks=Chunks(3, 2).of(model, batch))
    # three chunks, and the question
    assert len(calls) == times
    assert "forward" not in lower.__dict__
    assert_same(found, expected)


def test_layers_that_draw_random_numbers_are_computed_again():
    batch = unequal_batch()
    model = adapted_llama(settings={"initial_step_size": 0.5}).train()
    lower = model.model.layers[0]
    calls = []
    lower.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    parts = Chunks(3, 2).of(model, batch)
    calls.clear()
    lower.mlp.dropout = torch.nn.Dropout(0.1)
    meta_gradients(model, batch, chunks=parts)
    assert len(calls) == 2 * 3 + 1


@pytest.mark.parametrize("mixed", [False, True])
def test_chunks_of_bfloat16_are_as_close_to_float64_as_one_graph(mixed):
    batch = unequal_batch()
    settings = {"initial_step_size": 0.5}
    weights = adapted_llama(settings=settings).to(torch.bfloat16)
    exact = meta_gradients(adapted_llama(settings=settings).to(torch.bfloat16).double(), batch)
    model = adapted_llama(settings=settings).to(torch.bfloat16).float() if mixed else weights
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        expected = meta_gradients(model, batch)
        found = meta_gradients(model, batch, chunks=Chunks(1, 2).of(model, batch))
    assert found.adapter.dtype == torch.float32
    direct = relative(expected.adapter.double(), exact.adapter)
    assert 1e-4 < direct < 0.1
    assert relative(found.adapter.double(), exact.adapter) < 1.25 * direct


@pytest.mark.parametrize("mode", ["tie", "same", "fix"])
def test_accumulated_batches_in_chunks_have_the_gradients_of_one_graph(mode):
    learned = {}
    for size in ("all", 2):
        model = adapted_llama(settings={"step_size_mode": mode, "initial_step_size": 0.5})
        meta = Meta(ReGradConfig(meta_chunk=size))
        for seed in (1, 2):
            (meta.step(model, unequal_batch(seed))["loss"] / 2).backward()
        learned[size] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert learned["all"].keys() == learned[2].keys()
    assert any("step_size" in name for name in learned[2]) == (mode != "fix")
    for part in ("lora_", "step_size"):
        found, expected = (
            [gradient.flatten() for name, gradient in learned[size].items() if part in name] for size in (2, "all")
        )
        if expected:
            assert relative(torch.cat(found), torch.cat(expected)) < 1e-6


def test_chunks_are_sorted_by_length_and_cut_to_their_longest_passage():
    batch, model = unequal_batch(), adapted_llama()
    found = Chunks(3, 2).of(model, batch)
    assert [(list(part.rows), part.tokens) for part in found] == [([1, 5, 6], 40), ([0, 2, 3], 24), ([4], 5)]
    assert Chunks("all", 2).of(model, batch) is None
    assert Chunks(7, 2).of(model, batch) is None


def test_automatic_chunks_need_at_most_the_memory_of_the_device(monkeypatch):
    batch, model = unequal_batch(), adapted_llama()
    one = passage_bytes(model, 64, 2)
    # lengths are rounded up to 64 tokens
    for room, sizes in ((one // 2, [1] * 7), (3 * one, [3, 3, 1]), (8 * one, None)):
        monkeypatch.setitem(chunking.CHUNK_MEMORY, "cpu", room)
        found = Chunks("auto", 2).of(model, batch)
        assert found == sizes if sizes is None else [len(part.rows) for part in found] == sizes


@pytest.mark.parametrize("order", [1, 2])
def test_estimated_memory_of_a_passage_is_that_of_real_tensors(order):
    model = adapted_llama(attention="sdpa")
    estimated = passage_bytes(model, 64, order)
    assert not any(is_fake(each) for each in (*model.parameters(), *model.buffers()))
    batch = {name: tensor.repeat(1, 2)[:1] for name, tensor in unequal_batch().items() if name != "document_task"}
    batch["document_ids"], batch["document_mask"] = (torch.ones(1, 64, dtype=torch.long) for _ in range(2))
    found = differentiated_peak(model, batch, order)
    assert estimated == pytest.approx(found, rel=0.02)


def differentiated_peak(model, batch, order):
    with MemoryRecorder() as recorder:
        kept = [each.detach() for each in (*model.parameters(), *model.buffers())]
        before = recorder.live_bytes
        recorder.reset_peak()
        part = chunking.differentiate(model, batch["document_ids"], batch["document_mask"], create_graph=order == 2)
        if order == 2:
            chunking.hessian_products(model, part, torch.ones_like(part.displacements))
        assert len(kept) > 0
    return recorder.peak_bytes - before


def test_a_failed_estimate_differentiates_one_passage_at_a_time(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(chunking, "passage_bytes", fail)
    found = Chunks("auto", 2).of(adapted_llama(), unequal_batch())
    assert [len(part.rows) for part in found] == [1] * 7
    assert "one after the other" in caplog.text


@pytest.mark.parametrize("order", [1, 2])
def test_memory_of_one_passage_at_a_time_is_a_fraction_of_that_of_the_batch(order):
    model = adapted_llama()
    batch = unequal_batch()
    batch["document_ids"], batch["document_mask"] = (torch.full((7, 40), value) for value in (5, 1))
    peaks = {}
    for size in ("all", 1):
        with MemoryRecorder() as recorder:
            meta_gradients(model, batch, order=order, chunks=Chunks(size, order).of(model, batch))
        peaks[size] = recorder.peak_bytes
    # seven passages at once, or one beside gradients of three questions
    assert peaks[1] < 0.4 * peaks["all"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"meta_chunk": 0}, "from 1"), ({"meta_chunk": 2, "outer_loss": False}, "has no effect")],
)
def test_impossible_chunks_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReGradConfig(**settings)
