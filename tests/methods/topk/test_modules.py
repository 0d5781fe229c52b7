"""Models with top-k layers against an oracle: dense layers with hooks that keep k units by the definition."""

import copy
from operator import attrgetter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from graftwork.grafting.conversion import convert, restore
from graftwork.methods.topk import TopK, reference
from graftwork.methods.topk.modules import TopKFeedForward, activation_name
from graftwork.surgery.sites import feed_forward_sites
from tiny_models import TINY, assert_same, loss_and_gradients, padded_batch, real_logits, tiny_model

WITH_FEED_FORWARD = [name for name, tiny in TINY.items() if tiny.feed_forward]
GATED = ["llama", "mistral", "qwen2", "t5-gated", "mt5"]
PLAIN = [name for name in WITH_FEED_FORWARD if name not in GATED]
ACTIVATION = {
    "bert": "gelu",
    "roberta": "gelu",
    "xlm-roberta": "gelu",
    "camembert": "gelu",
    "electra": "gelu",
    "bart": "gelu",
    "opt": "relu",
    "distilbert": "gelu",
    "gpt2": "gelu_tanh",
    "t5": "relu",
    "t5-gated": "gelu_tanh",
    "mt5": "gelu_tanh",
    "llama": "silu",
    "mistral": "silu",
    "qwen2": "silu",
}
INLINE = ("bart", "opt")
"""Families whose feed-forward layers are computed by a larger layer."""
K = 6


def effective(projection):
    """Weight [out in] and bias of an affine module, recovered from its outputs."""
    width = projection.nx if isinstance(projection, Conv1D) else projection.in_features
    dtype = next(projection.parameters()).dtype
    bias = projection(torch.zeros(1, width, dtype=dtype))
    return (projection(torch.eye(width, dtype=dtype)) - bias).T, bias[0]


def oracle(name, model, k=K, rule=None):
    """Replace the input of every output projection of a dense model by the sparse activations of the definition."""
    handles = []
    for site in feed_forward_sites(model):
        layout, box = site.layout, {}

        def keep(module, inputs, box=box):
            box["x"] = inputs[0]

        def feed(module, inputs, site=site, layout=layout, box=box):
            x = box.pop("x")
            identity = torch.eye(inputs[0].shape[-1], dtype=x.dtype)
            first = [effective(attrgetter(path)(site.module)) for path in (layout.input, layout.up) if path]
            if layout.up is None:
                return reference.feed_forward(
                    x, first[0][0], identity, first[0][1], k=k, activation=ACTIVATION[name], selection=rule or "score"
                )
            return reference.gated_feed_forward(
                x, first[0][0], first[1][0], identity, k=k, activation=ACTIVATION[name], selection=rule or "product"
            )

        handles.append(attrgetter(layout.input)(site.module).register_forward_pre_hook(keep))
        # the layers of bart and opt are computed by a larger one
        handles.append(attrgetter(layout.output or "fc2")(site.module).register_forward_pre_hook(feed))
    return handles


def oracle_results(name, model, batch, **options):
    handles = oracle(name, model, **options)
    results = real_logits(model, name, batch), loss_and_gradients(model, batch)[1]
    for handle in handles:
        handle.remove()
    return results


def check(name, model, batch, expected):
    torch.testing.assert_close(real_logits(model, name, batch), expected[0], rtol=1e-9, atol=1e-9)
    assert_same(loss_and_gradients(model, batch)[1], expected[1])


RULES = [(name, rule) for name in PLAIN for rule in (None, "abs_act")] + [
    (name, rule) for name in GATED for rule in ("gate", "abs_act", "product")
]


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_models_with_topk_layers_equal_the_oracle(name, rule):
    model, batch = tiny_model(name), padded_batch(name)
    dense = real_logits(model, name, batch)
    expected = oracle_results(name, model, batch, rule=rule)
    assert (expected[0] - dense).abs().max() > 1e-3
    for chunk_size in (None,) if name in INLINE else (None, 4, 5):
        convert(model, TopK(feed_forward_k=K, selection=rule, feed_forward_chunk_size=chunk_size))
        check(name, model, batch, expected)


@pytest.mark.parametrize("name", [name for name in WITH_FEED_FORWARD if name not in INLINE])
def test_projections_called_as_modules_compute_the_same(name):
    model, batch = tiny_model(name), padded_batch(name)
    for rule in (None, "abs_act"):
        convert(model, TopK(feed_forward_k=K, selection=rule, feed_forward_chunk_size=5))
        expected = real_logits(model, name, batch), loss_and_gradients(model, batch)[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TopKFeedForward, "_fused", None)
            patch.setattr(TopKFeedForward, "is_fusible", lambda self, hidden: False)
            check(name, model, batch, expected)


@pytest.mark.parametrize("called", [False, True], ids=["fused", "called as modules"])
@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_the_backward_pass_uses_the_dropout_mask_of_the_forward_pass(name, called, monkeypatch):
    layer = feed_forward_sites(convert(tiny_model(name), TopK(feed_forward_k=K, feed_forward_chunk_size=4)).model)[
        0
    ].module
    layer.train().dropout.p = 0.5
    if called:
        monkeypatch.setattr(TopKFeedForward, "is_fusible", lambda self, hidden: False)
    x, upstream = torch.randn(2, 2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss():
        torch.manual_seed(0)
        return (layer(x) * upstream).sum()

    (expected,) = torch.autograd.grad(loss(), layer.wo.weight)
    weight, difference = layer.wo.weight, torch.zeros(expected.shape, dtype=torch.float64)
    for index in range(0, weight.numel(), 7):
        losses = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                weight.view(-1)[index] += step
            losses.append(loss().detach())
        with torch.no_grad():
            weight.view(-1)[index] += 1e-4
        difference.view(-1)[index] = (losses[0] - losses[1]) / 2e-4
    checked = torch.arange(weight.numel()) % 7 == 0
    torch.testing.assert_close(difference.view(-1)[checked], expected.reshape(-1)[checked], rtol=1e-7, atol=1e-7)


TARGETS = {
    "t5": ["wi", "wo"],
    "t5-gated": ["wi_0", "wi_1", "wo"],
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "bert": ["intermediate.dense", "output.dense"],
    "gpt2": ["c_fc", "c_proj"],
    "distilbert": ["lin1", "lin2"],
}


def with_lora(name, model):
    lora = LoraConfig(r=2, target_modules=TARGETS[name], lora_dropout=0.0, fan_in_fan_out=name == "gpt2")
    wrapped = get_peft_model(model, lora).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if "lora_A" in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.double()


@pytest.mark.parametrize("order", ["lora first", "conversion first"])
@pytest.mark.parametrize("name", TARGETS)
def test_lora_adapters_affect_selection_and_gradients_and_can_be_merged(name, order):
    batch, method = padded_batch(name), TopK(feed_forward_k=K)
    wrapped = with_lora(name, tiny_model(name))
    expected = oracle_results(name, wrapped, batch)
    if order == "lora first":
        convert(wrapped, method)
    else:
        wrapped = with_lora(name, convert(tiny_model(name), method).model)
    layers = [module for module in wrapped.modules() if isinstance(module, TopKFeedForward)]
    assert len(layers) == TINY[name].feed_forward
    without = real_logits(convert(tiny_model(name), method).model, name, batch)
    assert (expected[0] - without).abs().max() > 1e-3
    check(name, wrapped, batch, expected)
    assert any("lora_B" in parameter for parameter in expected[1])

    merged = wrapped.merge_and_unload()
    assert not any("lora" in parameter for parameter, _ in merged.named_parameters())
    torch.testing.assert_close(real_logits(merged, name, batch), expected[0], rtol=1e-9, atol=1e-9)
    assert restore(merged) > 0
    handles = oracle(name, merged)
    torch.testing.assert_close(real_logits(merged, name, batch), expected[0], rtol=1e-9, atol=1e-9)
    assert handles


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_compiled_model_computes_the_same(name):
    model, batch = tiny_model(name, dtype=torch.float32), padded_batch(name)
    convert(model, TopK(feed_forward_k=24, attention_k=64))
    expected = real_logits(model, name, batch)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(real_logits(compiled, name, batch), expected, rtol=1e-4, atol=1e-5)


def test_hidden_dropout_can_be_disabled():
    model, batch = tiny_model("t5", dropout_rate=0.0), padded_batch("t5")
    for site in feed_forward_sites(model):
        site.module.dropout.p = 0.5
    for k in (K, 24):
        convert(model, TopK(feed_forward_k=k, feed_forward_dropout=False)).model.train()
        with torch.no_grad():
            without = model(**batch).logits
            convert(model, TopK(feed_forward_k=k))
            torch.manual_seed(0)
            first, second = model(**batch).logits, model(**batch).logits
            torch.manual_seed(0)
            again = model(**batch).logits
            torch.testing.assert_close(without, model.eval()(**batch).logits, rtol=1e-12, atol=1e-12)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert not torch.equal(first, without)


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
def test_an_activation_without_a_fused_implementation_is_called(name):
    model, batch = tiny_model(name), padded_batch(name)
    for site in feed_forward_sites(model):
        parent, _, last = site.layout.activation.rpartition(".")
        setattr(site.module.get_submodule(parent), last, torch.nn.Tanh())
    dense = real_logits(model, name, batch)
    site = feed_forward_sites(model)[-1]
    parts = [effective(attrgetter(path)(site.module)) for path in site.layout.projections]
    convert(model, TopK(feed_forward_k=24))
    torch.testing.assert_close(real_logits(model, name, batch), dense, rtol=1e-9, atol=1e-9)
    convert(model, TopK(feed_forward_k=K))
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    score = x @ parts[0][0].T + parts[0][1]
    hidden = torch.tanh(score)
    if len(parts) == 3:
        hidden = hidden * (x @ parts[1][0].T + parts[1][1])
    ranked = hidden.abs() if len(parts) == 3 else score
    kept = torch.zeros_like(hidden).scatter(-1, ranked.topk(K).indices, 1)
    expected = (hidden * kept) @ parts[-1][0].T + parts[-1][1]
    torch.testing.assert_close(model.get_submodule(site.path)(x), expected, rtol=1e-9, atol=1e-9)


def test_the_activation_is_determined_from_the_layer():
    assert activation_name(torch.nn.GELU(approximate="tanh")) == "gelu_pytorch_tanh"
    assert activation_name(torch.nn.functional.gelu) == "gelu"
    assert activation_name(torch.nn.SiLU()) == "silu"
    assert activation_name(torch.nn.Tanh()) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_t5_keeps_its_output_projection_in_float32(tmp_path, dtype):
    tiny_model("t5", dtype=torch.float32).save_pretrained(tmp_path)
    model = type(tiny_model("t5")).from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    batch = padded_batch("t5")
    dense = real_logits(model, "t5", batch).float()
    convert(model, TopK(feed_forward_k=24, attention_k=64))
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == types
    assert (types["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32) == (dtype == "float16")
    found = real_logits(model, "t5", batch)
    assert found.dtype == getattr(torch, dtype)
    tolerance = 2e-2 if dtype == "bfloat16" else 4e-3
    assert (found.float() - dense).abs().max() <= tolerance * dense.abs().max()
    assert torch.isfinite(loss_and_gradients(model, batch)[0])


@pytest.mark.parametrize("name", ["t5", "llama", "bert", "gpt2"])
def test_gradients_under_autocast_are_float32(name):
    model, batch = tiny_model(name, dtype=torch.float32), padded_batch(name)
    convert(model, TopK(feed_forward_k=K, attention_k=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_a_printed_layer_shows_its_settings():
    model = convert(tiny_model("t5"), TopK(feed_forward_k=K, attention_k=4)).model
    assert "k=6, selection=score" in repr(model.encoder.block[0].layer[1].DenseReluDense)
    assert "k=4, chunk_size=None" in repr(copy.deepcopy(model.encoder.block[0].layer[0]))


class Wrapped(torch.Tensor):
    """Weight of a subclass, as torchao, bitsandbytes and DTensor use; its values must not be read as a plain matrix."""


def test_weights_of_a_tensor_subclass_are_multiplied_by_their_module(monkeypatch):
    model, batch = tiny_model("llama"), padded_batch("llama")
    expected = real_logits(convert(model, TopK(feed_forward_k=K)).model, "llama", batch)
    for site in feed_forward_sites(model):
        weight = site.module.gate_proj.weight.detach().as_subclass(Wrapped)
        site.module.gate_proj.weight = torch.nn.Parameter(weight)
        assert type(site.module.gate_proj.weight) is Wrapped
    monkeypatch.setattr(TopKFeedForward, "_fused", None)
    torch.testing.assert_close(real_logits(model, "llama", batch), expected, rtol=1e-9, atol=1e-9)
