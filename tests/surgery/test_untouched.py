"""Attention layers outside the selection keep their function, their mask, their memory and their outputs."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask, sdpa_mask

import graftwork as gw
from graftwork.metrics.cost import saved_tensors
from graftwork.surgery.attention import NAME, graft_attention, seam_modules
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import undo
from graftwork.surgery.sites import attention_sites
from tiny_models import GENERATORS, PAD, TINY, padded_batch, real_logits, tiny_model


class Nothing(nn.Module):
    """Attention that finds nothing."""

    def forward(self, owner, query, key, value, mask, **options):
        assert mask is None or isinstance(mask, (LazyMask, torch.Tensor))
        return torch.zeros_like(query)


@pytest.fixture
def registered(monkeypatch):
    """Registration of attention and mask functions that ends with the test."""

    def register(name, attention, mask=None):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, attention)
        if mask is not None:
            monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, mask)

    return register


def functions(model):
    return [site.module.config._attn_implementation for site in attention_sites(model)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_layers_before_the_chosen_one_are_bit_for_bit_dense(name, attention):
    model, batch = tiny_model(name, attention=attention, dtype=torch.float32), padded_batch(name)
    sites = attention_sites(model)
    seen = []
    for site in sites[:-1]:
        site.module.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))
    expected = real_logits(model, name, batch)
    graft_attention(model, "test", {sites[-1].path: Nothing()})
    assert functions(model) == [attention] * (len(sites) - 1) + [NAME]
    assert (real_logits(model, name, batch) - expected).abs().max() > 1e-3
    assert len(seen) == 2 * (len(sites) - 1)
    for before, after in zip(seen[: len(sites) - 1], seen[len(sites) - 1 :], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_identity_settings_in_one_layer_leave_the_model_dense(name, attention):
    # eager attention computes its softmax in float32 anyway
    dtype, tolerance = (torch.float32, 1e-4) if attention == "eager" else (torch.float64, 1e-9)
    model, batch = tiny_model(name, attention=attention, dtype=dtype), padded_batch(name)
    expected = real_logits(model, name, batch)
    gw.convert(model, gw.TopK(attention_k=64, layers="0"))
    torch.testing.assert_close(real_logits(model, name, batch), expected, rtol=tolerance, atol=tolerance)


def test_a_registered_function_and_its_masks_stay_with_the_layers_that_were_not_chosen(registered):
    asked, received = [], []

    def mask(*args, **kwargs):
        asked.append(kwargs["config"]._attn_implementation)
        return ("mask of mine", kwargs["q_length"])

    def attention(module, query, key, value, attention_mask, **kwargs):
        received.append((module.layer_idx, attention_mask))
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    registered("mine", attention, mask)
    model = tiny_model("llama", attention="mine", num_hidden_layers=4)
    gw.convert(model, gw.TopK(attention_k=2, layers="1"))
    model(torch.ones(1, 5, dtype=torch.long))
    # one mask for all three layers, made by the function of the layers
    assert asked == ["mine"]
    assert received == [(0, ("mask of mine", 5)), (2, ("mask of mine", 5)), (3, ("mask of mine", 5))]


def test_a_function_without_a_mask_function_gets_no_mask(registered):
    received = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        received.append(attention_mask)
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    registered("mine", attention)
    model = tiny_model("llama", attention="mine")
    gw.convert(model, gw.TopK(attention_k=2, layers="1"))
    model(**padded_batch("llama"))
    assert received == [None]


def test_flash_attention_gets_its_padding_mask(registered):
    received = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        received.append(attention_mask)
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    registered("flash_attention_2", attention, flash_attention_mask)
    model, batch = tiny_model("llama"), padded_batch("llama")
    model.config._attn_implementation = "flash_attention_2"
    gw.convert(model, gw.TopK(attention_k=2, layers="1"))
    model(**batch)
    assert torch.equal(received[0], batch["attention_mask"].bool())


@pytest.mark.parametrize("padded", [False, True])
def test_all_layers_share_one_mask_per_forward_pass(padded, monkeypatch):
    made = []

    def counted(*args, **kwargs):
        made.append(sdpa_mask(*args, **kwargs))
        return made[-1]

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", counted)
    model, batch = tiny_model("llama", num_hidden_layers=4), padded_batch("llama")
    if not padded:
        batch.pop("attention_mask")
    gw.convert(model, gw.TopK(attention_k=2, layers="1"))
    model(**batch)
    assert len(made) == 1
    assert (made[0] is None) == (not padded)
    model(**batch)
    assert len(made) == 2


def saved_mebibytes(layers, tokens=1024):
    config = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": tokens,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="sdpa")).train()
    if layers is not None:
        gw.convert(model, gw.TopK(attention_k=32, layers=layers or None))
    with saved_tensors() as saved:
        output = model.model(torch.zeros(1, tokens, dtype=torch.long)).last_hidden_state
    assert output.requires_grad
    return saved.bytes / 2**20


def test_a_partly_converted_model_saves_between_dense_and_fully_converted():
    dense, part, whole = saved_mebibytes(None), saved_mebibytes("0"), saved_mebibytes("")
    assert dense < part < whole
    # one of six layers: a mask of 1,024 × 1,024 alone would add at least 1 MiB
    assert part - dense == pytest.approx((whole - dense) / 6, abs=0.5)


def test_only_configurations_with_a_chosen_module_change():
    model = tiny_model("t5")
    gw.convert(model, gw.TopK(attention_k=2, stacks=("encoder",)))
    assert model.encoder.config._attn_implementation == NAME
    assert model.decoder.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_a_view_of_a_configuration_shows_later_changes():
    model = tiny_model("llama")
    gw.convert(model, gw.TopK(attention_k=2, layers="1"))
    view = model.model.layers[0].self_attn.config
    assert isinstance(view, transformers.LlamaConfig)
    model.config.bos_token_id = 9
    assert view.bos_token_id == 9
    assert (view._attn_implementation, model.config._attn_implementation) == ("sdpa", NAME)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_copied_model_computes_the_same_and_is_restored_alone(name, how):
    model, batch = tiny_model(name), padded_batch(name)
    dense = real_logits(model, name, batch)
    gw.convert(model, gw.TopK(attention_k=2, layers="1"))
    expected = real_logits(model, name, batch)
    copied = how(model)
    assert torch.equal(real_logits(copied, name, batch), expected)
    gw.restore(copied)
    assert torch.equal(real_logits(copied, name, batch), dense)
    assert not any(module._forward_pre_hooks for module in copied.modules())
    assert torch.equal(real_logits(model, name, batch), expected)
    assert "model" not in name or model.config is not copied.config


@pytest.mark.parametrize("name", GENERATORS)
def test_a_partly_converted_model_generates_the_tokens_of_the_dense_model(name):
    model, batch = tiny_model(name), padded_batch(name)
    batch.pop("labels")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**batch, **options)
    gw.convert(model, gw.TopK(attention_k=64, layers="1"))
    assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_partly_converted_model_serves_a_static_cache(name):
    model, batch = tiny_model(name), padded_batch(name)
    batch.pop("labels")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**batch, **options)
    gw.convert(model, gw.TopK(attention_k=64, layers="1"))
    assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), expected)


def test_two_methods_share_a_model_and_leave_it_one_by_one():
    model, batch = tiny_model("llama", num_hidden_layers=3), padded_batch("llama")
    dense = real_logits(model, "llama", batch)
    gw.convert(model, gw.TopK(attention_k=2, layers="0"))
    first = real_logits(model, "llama", batch)
    gw.convert(model, gw.Sparsefinder(alpha=1.5, layers="2"))
    assert functions(model) == [NAME, "sdpa", NAME]
    undo(model, ["sparsefinder"])
    assert functions(model) == [NAME, "sdpa", "sdpa"]
    assert torch.equal(real_logits(model, "llama", batch), first)
    undo(model, ["topk"])
    assert torch.equal(real_logits(model, "llama", batch), dense)
    assert functions(model) == ["sdpa"] * 3
    assert not seam_modules(model)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", "0"),
        pytest.param("t5", "0", marks=pytest.mark.long),
        pytest.param("mistral", "0", marks=pytest.mark.long),
        # a sliding window
        ("mistral", None),
    ],
)
def test_a_converted_model_compiles_into_one_graph(name, layers):
    model, batch = tiny_model(name, dtype=torch.float32), padded_batch(name)
    assert name != "mistral" or model.config.sliding_window < 11
    gw.convert(model, gw.TopK(attention_k=3, layers=layers))
    expected = real_logits(model, name, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(real_logits(compiled, name, batch), expected, rtol=1e-5, atol=1e-5)
