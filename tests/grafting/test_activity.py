"""A graft that other code has switched off is noticed by every stage, and switching it off by mistake is refused."""

import copy

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import graftwork as gw
from graftwork.errors import UnsupportedModelError
from graftwork.grafting.activity import check_active
from graftwork.grafting.converted import probe_model
from graftwork.methods.topk.modules import TopKAttention
from graftwork.pipeline.diagnosis import diagnose
from graftwork.surgery.modules import undo_steps
from tiny_models import TINY, padded_batch, real_logits, tiny_model, word_tokenizer


def switch_by_config(model):
    model.config._attn_implementation = "sdpa"


def remove_graft(model):
    del model.model.layers[0].self_attn._modules["graftwork_attention"]


def replace_feed_forward(model):
    model.model.layers[0].mlp = nn.Identity()


BREAKS = {
    switch_by_config: "_attn_implementation of the configuration",
    remove_graft: r"model\.layers\.0\.self_attn\.graftwork_attention",
    replace_feed_forward: r"model\.layers\.0\.mlp",
}


def converted(name="llama", **options):
    model = tiny_model(name, **options)
    return gw.convert(model, gw.TopK(attention_k=3, feed_forward_k=6), tokenizer=word_tokenizer())


@pytest.mark.parametrize("layers", [None, "0"])
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_setting_another_implementation_is_refused_and_keeps_the_graft(name, layers):
    model, batch = tiny_model(name), padded_batch(name)
    gw.convert(model, gw.TopK(attention_k=3, layers=layers))
    expected = real_logits(model, name, batch)
    with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation.*graftwork\.restore"):
        model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        model.base_model.set_attn_implementation("sdpa")
    assert torch.equal(real_logits(model, name, batch), expected)
    gw.restore(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_wrapped_model_refuses_it_too():
    wrapper = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    gw.convert(wrapper, gw.TopK(attention_k=3))
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        wrapper.set_attn_implementation("eager")


@pytest.mark.parametrize("change", BREAKS)
def test_every_stage_notices_a_graft_that_is_not_active(change, tmp_path):
    given = converted(dtype=torch.float32)
    change(given.model)
    stages = {
        "save the model": lambda: given.save(tmp_path / "run"),
        "evaluate the model": lambda: gw.evaluate(given, ["world/facts"]),
        "predict with this model": lambda: gw.predict(given, ["a"]),
        "run the model": lambda: probe_model(given.model),
    }
    for action, stage in stages.items():
        with pytest.raises(UnsupportedModelError, match=rf"Cannot {action}.*{BREAKS[change]}.*not active"):
            stage()
    assert not (tmp_path / "run" / "model").exists()


def test_doctor_names_the_module_of_a_graft_that_is_not_active(tmp_path, monkeypatch):
    converted(dtype=torch.float32).save(tmp_path / "run")
    from graftwork.pipeline import loading

    load = loading.load

    def damaged(*args, **kwargs):
        loaded = load(*args, **kwargs)
        remove_graft(loaded.model)
        return loaded

    monkeypatch.setattr(loading, "load", damaged)
    findings, _ = diagnose(str(tmp_path / "run"))
    probe = next(entry for entry in findings if entry["check"] == "probe")
    assert probe["state"] == "wrong"
    assert "model.layers.0.self_attn.graftwork_attention" in probe["found"]


@pytest.mark.parametrize("name", TINY)
def test_converted_copied_wrapped_and_restored_models_pass(name):
    model = tiny_model(name)
    check_active(model, "test")
    settings = {"feed_forward_k": 6} if TINY[name].feed_forward else {}
    gw.convert(model, gw.TopK(attention_k=3, layers="1", **settings))
    check_active(model, "test")
    copied = copy.deepcopy(model)
    check_active(copied, "test")
    lora = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    wrapper = get_peft_model(copied, lora)
    check_active(wrapper, "test")
    gw.restore(model)
    check_active(model, "test")
    assert not undo_steps(model)


def dispatch(model):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("first", ["convert", "dispatch"])
def test_modules_with_hooks_of_accelerate_pass(first):
    model = tiny_model("bert")
    steps = [lambda: gw.convert(model, gw.Cald(rank=4)), lambda: dispatch(model)]
    for step in steps if first == "convert" else reversed(steps):
        step()
    check_active(model, "test")


def test_a_model_type_that_is_proven_at_conversion_passes():
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    gw.convert(model, gw.TopK(attention_k=3))
    assert isinstance(model.model.layers[0].self_attn.graftwork_attention, TopKAttention)
    check_active(model, "test")
    gw.restore(model)
    assert not undo_steps(model)
