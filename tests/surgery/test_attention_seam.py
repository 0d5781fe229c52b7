"""The attention seam hands every graft what dense attention would have seen, and refuses what it cannot hand over."""

import accelerate
import pytest
import torch
import transformers
from torch import nn

from graftwork.errors import UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.methods.cald import Cald
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from graftwork.surgery.attention import attention_function, graft_attention
from graftwork.surgery.masks import LazyMask, PositionBias
from graftwork.surgery.sites import attention_sites
from tiny_models import (
    GENERATORS,
    PAD,
    TINY,
    VOCABULARY,
    anatomy,
    padded_batch,
    real_logits,
    tiny_model,
)


class PlainAttention(nn.Module):
    """Attention written out, which shares nothing with the seam but the arguments that it receives."""

    def forward(self, owner, query, key, value, mask, *, scaling, dropout, position_bias):
        assert mask is None or isinstance(mask, (LazyMask, torch.Tensor))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        score = scaling * query @ key.mT
        if isinstance(position_bias, PositionBias):
            position_bias = position_bias.block(0, query.shape[2], key.shape[2])
        if position_bias is not None:
            score = score + position_bias
        if isinstance(mask, LazyMask):
            mask = mask.dense(query.device)
        if mask is not None:
            score = score.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else score + mask
        return torch.softmax(score, -1) @ value


class Nothing(nn.Module):
    """Attention that finds nothing."""

    def forward(self, owner, query, key, value, mask, **options):
        return torch.zeros_like(query)


def graft_everywhere(model, make=PlainAttention):
    graft_attention(model, "test", {site.path: make() for site in attention_sites(model)})
    return model


def ids_of(*lengths, seed=4):
    return torch.randint(3, VOCABULARY, lengths, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_a_graft_receives_mask_scaling_and_bias(name, attention):
    model, batch = tiny_model(name, attention=attention, dtype=torch.float32), padded_batch(name)
    expected = real_logits(model, name, batch)
    graft_everywhere(model)
    torch.testing.assert_close(real_logits(model, name, batch), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_graft_works_without_any_attention_mask(name):
    model, batch = tiny_model(name), {"input_ids": ids_of(2, 9)}
    if TINY[name].kind == "both":
        batch["decoder_input_ids"] = ids_of(2, 5)
    with torch.no_grad():
        expected = model(**batch).logits
        found = graft_everywhere(model)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_graft_serves_cached_generation(name):
    model, batch = tiny_model(name), padded_batch(name)
    batch.pop("labels")
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": PAD,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(**batch, **options)
    found = graft_everywhere(model).generate(**batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_a_graft_serves_a_static_cache(name):
    model, batch = tiny_model(name), padded_batch(name)
    batch.pop("labels")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**batch, **options)
    assert torch.equal(graft_everywhere(model).generate(**batch, **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_stay_apart(attention):
    dtype = torch.float32 if attention == "eager" else torch.float64
    model, ids = tiny_model("llama", attention=attention, dtype=dtype), ids_of(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        apart = model(ids[:, 5:], use_cache=False).logits
        found = graft_everywhere(model)(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(expected[:, 5:], apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_users_own_mask_of_four_axes_is_kept(name, additive):
    model, ids = tiny_model(name), ids_of(2, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[:, :, 4:, 1] = False
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected, causal = model(ids, attention_mask=mask).logits, model(ids).logits
        found = graft_everywhere(model)(ids, attention_mask=mask).logits
    assert (expected - causal).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_cross_attention_in_a_bert_decoder_is_found_and_served():
    config = transformers.BertConfig(**TINY["bert"].config, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).double().eval()
    states, mask = torch.randn(2, 7, 16, dtype=torch.float64), torch.ones(2, 7)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids_of(2, 5), "encoder_hidden_states": states, "encoder_attention_mask": mask}
    assert [site.kind for site in attention_sites(model)] == ["self", "cross"] * 2
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(graft_everywhere(model)(**inputs).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_model_that_ignores_registered_attention_is_refused_unchanged(monkeypatch):
    model, batch = tiny_model("llama"), padded_batch("llama")
    before, state, logits = anatomy(model), set(model.__dict__), real_logits(model, "llama", batch)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UnsupportedModelError, match=r"ignores registered attention.*Nothing was changed"):
        convert(model, TopK(attention_k=4))
    assert anatomy(model) == before
    assert set(model.__dict__) == state
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(real_logits(model, "llama", batch), logits)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("softcap", 50.0),
        ("s_aux", torch.zeros(4)),
        ("cu_seq_lens_q", torch.zeros(2)),
        ("indices", torch.zeros(2)),
        ("unheard_of", 1),
    ],
)
def test_unsupported_arguments_are_refused(argument, value):
    model = graft_everywhere(tiny_model("llama"))
    module = attention_sites(model)[0].module
    tensors = [torch.zeros(1, heads, 3, 8) for heads in (4, 2, 2)]
    with pytest.raises(UnsupportedModelError, match=f"LlamaAttention.*{argument}"):
        attention_function(module, *tensors, None, **{argument: value})


def test_arguments_without_an_effect_and_absent_ones_are_accepted():
    model = graft_everywhere(tiny_model("llama"))
    module = attention_sites(model)[0].module
    tensors = [torch.zeros(1, heads, 3, 8) for heads in (4, 2, 2)]
    output, _ = attention_function(module, *tensors, None, position_ids=torch.arange(3), softcap=None, indices=None)
    assert output.shape == (1, 3, 4, 8)


@pytest.mark.parametrize("name", TINY)
def test_requests_for_attention_weights_are_refused(name):
    model, batch = graft_everywhere(tiny_model(name)), padded_batch(name)
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        model(**batch, output_attentions=True)
    assert model(**batch, output_hidden_states=True).loss is not None


def test_attention_weights_requested_by_the_config_are_refused():
    model = tiny_model("llama", attention="eager", dtype=torch.float32)
    model.config.output_attentions = True
    graft_everywhere(model)
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        model(**padded_batch("llama"))
    restore(model)
    assert len(model(**padded_batch("llama")).attentions) == 2


def test_an_attention_module_without_a_graft_is_refused():
    model = graft_everywhere(tiny_model("llama"))
    module = attention_sites(model)[0].module
    del module._modules["graftwork_attention"]
    with pytest.raises(UnsupportedModelError, match="holds no graft"):
        model(ids_of(1, 3))


def test_keys_from_outside_the_sequence_are_refused():
    model = graft_everywhere(tiny_model("llama"))
    module = attention_sites(model)[0].module
    tensors = [torch.zeros(1, heads, keys, 8) for heads, keys in ((4, 3), (2, 5), (2, 5))]
    with pytest.raises(UnsupportedModelError, match="5 keys under a mask for 3"):
        attention_function(module, *tensors, LazyMask(1, 3, 3, causal=True))


def offload_to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")


def offload_to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")


def dispatch(model, folder):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("place", [dispatch, offload_to_cpu, offload_to_disk])
@pytest.mark.parametrize("first", ["convert", "place"])
@pytest.mark.parametrize("name", ["t5", "t5-gated", "llama", "gpt2", "bert", "distilbert"])
def test_off_loaded_models_compute_the_same(name, first, place, tmp_path):
    batch, method = padded_batch(name), TopK(attention_k=3, feed_forward_k=6)
    expected = real_logits(convert(tiny_model(name), method).model, name, batch)
    model = tiny_model(name)
    steps = [lambda: convert(model, method), lambda: place(model, tmp_path)]
    for step in steps if first == "convert" else reversed(steps):
        step()
    if place is not dispatch:
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(real_logits(model, name, batch), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", [-1e4, -1e9, -65504.0, torch.finfo(torch.float64).min, -torch.inf])
@pytest.mark.parametrize(
    "method", [TopK(attention_k=3), Sparsefinder(alpha=1.5), Cald(rank=4)], ids=["topk", "sparsefinder", "cald"]
)
def test_an_additive_padding_mask_with_any_large_number_equals_the_mask_of_ones_and_zeros(method, number):
    model, batch = tiny_model("bert"), padded_batch("bert")
    convert(model, method)
    real = batch["attention_mask"].bool()
    additive = torch.zeros(3, 1, 1, 11, dtype=torch.float64).masked_fill(~real[:, None, None, :], number)
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
        found = model(batch["input_ids"], attention_mask=additive.expand(3, 1, 11, 11)).logits[real]
        blind = model(batch["input_ids"]).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (blind - expected).abs().max() > 1e-2
