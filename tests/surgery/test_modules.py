"""Replacing, adding and overriding can be taken back, one method at a time, with and without wrappers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from graftwork.errors import UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.methods.topk import TopK
from graftwork.surgery.modules import add_module, override, replace_module, undo, undo_steps
from tiny_models import anatomy, padded_batch, real_logits, tiny_model


class Doubled(nn.Module):
    """Holds the children of another module under their names."""

    def __init__(self, original):
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)

    def forward(self, hidden):
        return 2 * self.wo(torch.relu(self.wi(hidden)))


FEED_FORWARD = "encoder.block.0.layer.1.DenseReluDense"


def test_a_replaced_module_keeps_parameters_and_mode_and_can_be_restored():
    model = tiny_model("t5").train()
    old, keys = model.get_submodule(FEED_FORWARD), list(model.state_dict())
    replace_module(model, "one", FEED_FORWARD, Doubled(old).eval())
    new = model.get_submodule(FEED_FORWARD)
    assert isinstance(new, Doubled)
    assert new.training
    assert new.wi.weight is old.wi.weight
    assert list(model.state_dict()) == keys
    assert old not in set(model.modules())
    assert undo(model) == 1
    assert model.get_submodule(FEED_FORWARD) is old


def test_undo_keeps_the_training_mode():
    model = tiny_model("t5").train()
    replace_module(model, "one", FEED_FORWARD, Doubled(model.get_submodule(FEED_FORWARD)))
    model.eval()
    undo(model)
    assert not any(module.training for module in model.modules())


def test_undo_removes_added_modules_and_overrides():
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[0]
    before, own = anatomy(model), set(layer.__dict__)
    add_module(model, "one", layer, "extra", nn.Linear(2, 2))
    override(model, "one", layer, "feed_forward_chunk", lambda hidden: hidden)
    assert layer.extra.in_features == 2
    assert layer.feed_forward_chunk("x") == "x"
    assert undo(model) == 2
    assert anatomy(model) == before
    assert set(layer.__dict__) == own


def test_undo_of_one_method_keeps_the_other():
    model = tiny_model("t5")
    second = FEED_FORWARD.replace("block.0", "block.1")
    for method, path in (("one", FEED_FORWARD), ("two", second)):
        replace_module(model, method, path, Doubled(model.get_submodule(path)))
    assert undo(model, ["one"]) == 1
    assert not isinstance(model.get_submodule(FEED_FORWARD), Doubled)
    assert isinstance(model.get_submodule(second), Doubled)
    assert undo_steps(model)
    assert any(step.method == "two" for step in undo_steps(model))
    assert all(step.method != "one" for step in undo_steps(model))


def test_stacked_changes_are_reverted_newest_first():
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[0]
    for value in (1, 2, 3):
        override(model, "one", layer, "number", value)
    undo(model)
    assert not hasattr(layer, "number")


def test_undo_of_an_unchanged_model_reverts_nothing():
    model = tiny_model("bert")
    state = set(model.__dict__)
    assert undo(model) == 0
    assert restore(model) == 0
    assert set(model.__dict__) == state


def test_a_module_without_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="holds no transformers model"):
        restore(nn.Linear(2, 2))


def test_a_projection_replaced_after_the_change_survives_undo():
    model = tiny_model("t5")
    replace_module(model, "one", FEED_FORWARD, Doubled(model.get_submodule(FEED_FORWARD)))
    other = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    model.get_submodule(FEED_FORWARD).wi = other
    undo(model)
    assert model.get_submodule(FEED_FORWARD).wi is other


def test_a_copy_carries_its_own_steps():
    model = convert(tiny_model("t5"), TopK(attention_k=2, feed_forward_k=3)).model
    copied = copy.deepcopy(model)
    count = len(undo_steps(model))
    restore(copied)
    assert len(undo_steps(model)) == count
    inside = set(model.modules())
    assert all(step.parent in inside for step in undo_steps(model) if isinstance(step.parent, nn.Module))


@pytest.mark.parametrize("name", ["t5", "llama", "bert", "gpt2"])
@pytest.mark.parametrize("converted_through", ["wrapper", "model"])
@pytest.mark.parametrize("restored_through", ["wrapper", "model"])
def test_a_wrapped_model_can_be_restored_from_inside_and_from_outside(name, converted_through, restored_through):
    targets = {"t5": ["wi", "q"], "llama": ["gate_proj"], "bert": ["query"], "gpt2": ["c_fc"]}[name]
    model, batch, method = tiny_model(name), padded_batch(name), TopK(attention_k=2, feed_forward_k=3)
    dense = real_logits(model, name, batch)
    lora = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2")
    if converted_through == "model":
        convert(model, method)
    wrapper = get_peft_model(model, lora).eval()
    if converted_through == "wrapper":
        convert(wrapper, method)
    assert (real_logits(wrapper, name, batch) - dense).abs().max() > 1e-3
    assert restore(wrapper if restored_through == "wrapper" else model) > 0
    torch.testing.assert_close(real_logits(wrapper, name, batch), dense, rtol=1e-12, atol=1e-12)
    assert not undo_steps(model)
    assert any("lora" in name for name, _ in model.named_parameters())


def test_converting_a_wrapped_model_again_replaces_what_was_on_it_before():
    model, batch = tiny_model("t5"), padded_batch("t5")
    dense = real_logits(model, "t5", batch)
    convert(model, TopK(attention_k=2, feed_forward_k=3))
    wrapper = get_peft_model(model, LoraConfig(r=2, target_modules=["q"])).eval()
    converted = convert(wrapper, TopK(attention_k=64, feed_forward_k=24))
    assert len(converted.changes) == 10
    assert len(converted.methods) == 1
    torch.testing.assert_close(real_logits(wrapper, "t5", batch), dense, rtol=1e-9, atol=1e-9)
