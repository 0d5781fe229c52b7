"""Methods on representative model types, and the table of all types."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.auto import modeling_auto

import graftwork as gw
import sweep_types as sweeps
import tiny_types
from graftwork.cli import families
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.methods.cald import Cald
from graftwork.methods.regrad import ReGrad
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load
from graftwork.surgery import coverage
from graftwork.surgery import families as families_module
from tiny_models import word_tokenizer

REPRESENTATIVE = [
    *("albert", "bloom", "camembert", "codegen", "deberta-v2", "eurobert", "falcon", "gemma", "gemma2", "glm4"),
    *("gpt_neox", "gpt_oss", "granite", "m2m_100", "marian", "mixtral", "modernbert", "mpnet", "olmo3", "opt"),
    *("phi3", "qwen3", "qwen3_moe", "smollm3", "umt5"),
]


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_representative_type_is_changed_or_refused_as_the_table_says(model_type):
    found = sweeps.sweep(model_type, tiny_types.model_types()[model_type])
    assert {column: value.partition(":")[0] for column, value in found.items()} == {
        column: value.partition(":")[0] for column, value in coverage.table()[model_type].items()
    }
    assert set(found) == set(coverage.COLUMNS)
    assert not [value for value in found.values() if value.startswith("FAILED")]


def test_the_table_describes_the_installed_transformers():
    message = "the table of model types is stale; run `make coverage`"
    assert coverage.version() == transformers.__version__, message
    assert set(coverage.table()) == set(tiny_types.model_types()), message


def test_the_table_has_no_failures_and_enough_types():
    counts = dict.fromkeys(coverage.COLUMNS, 0)
    for row in coverage.table().values():
        assert not [value for value in row.values() if value.startswith("FAILED")]
        for column in coverage.COLUMNS:
            counts[column] += row.get(column) == coverage.VERIFIED
    assert counts["topk attention"] >= 120
    assert counts["topk feed-forward"] >= 100
    assert counts["regrad"] >= 50


def test_most_causal_masked_and_sequence_to_sequence_types_are_text_types():
    kinds = list(tiny_types.model_types().values())
    assert kinds.count("decoder") > 0.8 * len(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - 40
    assert {"encoder", "decoder", "both"} == set(kinds)


def test_reasons_name_no_model():
    assert families.reason(
        "refused: cald cannot change XForMaskedLM: a.layers.3.b is causal. Nothing was changed."
    ) == ("cald cannot change the model: a layer is causal.")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_keep_the_k_largest_activations_of_each_token(model_type):
    model, _ = tiny_types.build(model_type, "decoder")
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    torch.manual_seed(0)
    x = torch.randn(7, 32, dtype=experts.down_proj.dtype)
    indices = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [0, 2], [1, 3], [2, 1]])
    weights = torch.rand(7, 2, dtype=x.dtype)
    expected = torch.zeros_like(x)
    for token, (chosen, shares) in enumerate(zip(indices.tolist(), weights, strict=True)):
        for number, share in zip(chosen, shares, strict=True):
            expected[token] += share * _expert(experts, number, x[token], k=5)
    converted = convert(model, TopK(feed_forward_k=5)).model
    found = next(module for name, module in converted.named_modules() if name.endswith("experts"))(x, indices, weights)
    torch.testing.assert_close(found, expected)


def _expert(experts, number, x, k):
    """One expert of one token by the definition: the k largest |φ(gate)·up|, then the output projection."""
    w_in, w_out = experts.gate_up_proj[number], experts.down_proj[number]
    if experts.is_transposed:
        w_in, w_out = w_in.T, w_out.T
    scores = w_in @ x + (experts.gate_up_proj_bias[number] if experts.has_bias else 0)
    hidden = experts._apply_gate(scores[None])[0]
    kept = hidden.abs().topk(k).indices
    result = w_out[:, kept] @ hidden[kept]
    return result + (experts.down_proj_bias[number] if experts.has_bias else 0)


@pytest.mark.parametrize(("model_type", "kind"), [("opt", "decoder"), ("albert", "encoder"), ("marian", "both")])
def test_an_activation_between_projections_keeps_the_k_highest_scores(model_type, kind):
    model, _ = tiny_types.build(model_type, kind)
    converted = convert(copy.deepcopy(model), TopK(feed_forward_k=5)).model
    seen = {}

    def output_projection(owner):
        return getattr(owner, {"albert": "ffn_output"}.get(model_type, "fc2"))

    for name, module in converted.named_modules():
        if hasattr(module, {"albert": "ffn_output"}.get(model_type, "fc2")):
            output_projection(module).register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, args[0].detach())
            )
    with torch.no_grad():
        converted(**tiny_types.batch(kind))
    assert seen
    for hidden in seen.values():
        assert int((hidden != 0).sum(-1).max()) <= 5
        assert int((hidden != 0).sum()) > 0


class Scaled(torch.nn.Module):
    """Feed-forward layer of an unknown layout: the output is doubled."""

    def __init__(self, original):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj
        self.act_fn = original.act_fn

    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_layer_that_computes_something_else_is_named_and_nothing_is_changed():
    model, before = tiny_types.build("qwen3", "decoder")
    layer = model.model.layers[1]
    layer.mlp = Scaled(layer.mlp)
    expected = tiny_types.observe(model, "decoder")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp \(Scaled\).*values differ.*Nothing was changed"):
        convert(model, TopK(feed_forward_k=5))
    assert sweeps.difference(tiny_types.observe(model, "decoder"), expected) == 0
    assert sweeps.difference(expected, before) > 0


def test_the_full_attention_layers_of_an_encoder_with_windows_are_compressed():
    model, expected = tiny_types.build("modernbert", "encoder")
    converted = convert(model, Cald(rank=64, positions=64, initialization="identity", layers="0"))
    assert [change.path for change in converted.changes] == ["model.layers.0.attn"]
    assert sweeps.difference(tiny_types.observe(converted.model, "encoder"), expected) < 1e-5


def test_a_registered_family_is_found_by_its_class_names(monkeypatch):
    family = families_module.Family(
        "qwen3",
        "decoder",
        attention=("Qwen3Attention",),
        feed_forward=(
            families_module.FeedForwardLayout("Qwen3MLP", "gate_proj", "down_proj", up="up_proj", activation="act_fn"),
        ),
    )
    monkeypatch.setattr(families_module.REGISTRY, "_entries", dict(families_module.REGISTRY._entries))
    gw.register_family(family)
    with pytest.raises(ConfigError, match="second family called 'qwen3'"):
        gw.register_family(family)
    model, expected = tiny_types.build("qwen3", "decoder")
    converted = convert(model, TopK(feed_forward_k=1.0))
    assert len(converted.changes) == 2
    assert all(change.after.startswith("TopKFeedForward") for change in converted.changes)
    assert sweeps.difference(tiny_types.observe(converted.model, "decoder"), expected) < 1e-5


def test_an_automatic_k_is_refused_where_the_kept_mass_is_not_measured():
    model, _ = tiny_types.build("opt", "decoder")
    with pytest.raises(ConfigError, match=r"kept mass of OPTDecoderLayer.*cannot be measured"):
        TopK(feed_forward_k="auto:0.9").calibrate(model, None, ())


def test_a_gate_and_an_up_projection_in_one_matrix_are_not_adapted_apart():
    model, _ = tiny_types.build("phi3", "decoder")
    with pytest.raises(ConfigError, match="gate and up are one matrix"):
        convert(model, ReGrad(rank=2, projections=("gate",)))
    changes = convert(model, ReGrad(rank=2)).changes
    assert {change.path.rpartition(".")[2] for change in changes} == {"gate_up_proj", "down_proj"}


PARTS = 8


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_every_type_has_the_outcome_of_the_table(part):
    kinds = tiny_types.model_types()
    for model_type in list(kinds)[part::PARTS]:
        found = sweeps.sweep(model_type, kinds[model_type])
        expected = coverage.table()[model_type]
        assert {column: value.partition(":")[0] for column, value in found.items()} == {
            column: value.partition(":")[0] for column, value in expected.items()
        }, model_type


UNLISTED = [("qwen3", "decoder"), ("phi3", "decoder"), ("gpt_oss", "decoder"), ("albert", "encoder"), ("umt5", "both")]


@pytest.mark.parametrize(("model_type", "kind"), UNLISTED)
def test_an_unlisted_type_is_copied_saved_loaded_and_restored(model_type, kind, tmp_path):
    model, dense = tiny_types.build(model_type, kind)
    model = model.float()
    dense = tiny_types.observe(model, kind)
    converted = convert(model, TopK(attention_k=3, feed_forward_k=6), tokenizer=word_tokenizer())
    sparse = tiny_types.observe(model, kind)
    assert sweeps.difference(sparse, dense) > 1e-3
    converted.save(tmp_path / "run")
    loaded = load(tmp_path / "run", strict=True)
    assert loaded.changes == converted.changes
    assert sweeps.difference(tiny_types.observe(loaded.model, kind), sparse) == 0
    copied = copy.deepcopy(model)
    assert sweeps.difference(tiny_types.observe(copied, kind), sparse) == 0
    convert(copied, TopK(attention_k=64, feed_forward_k=1.0))
    assert sweeps.difference(tiny_types.observe(copied, kind), dense) < 1e-5
    assert sweeps.difference(tiny_types.observe(model, kind), sparse) == 0
    restore(model)
    assert sweeps.difference(tiny_types.observe(model, kind), dense) == 0


@pytest.mark.parametrize(("model_type", "targets"), [("qwen3", ["gate_proj", "v_proj"]), ("opt", ["fc1", "fc2"])])
@pytest.mark.parametrize("first", ["lora", "topk"])
def test_adapters_of_an_unlisted_type_are_trained(model_type, targets, first):
    model, _ = tiny_types.build(model_type, "decoder")
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    whole = TopK(attention_k=64, feed_forward_k=1.0)
    torch.manual_seed(0)
    if first == "topk":
        convert(model, whole)
        wrapper = get_peft_model(model, lora).eval()
        found = tiny_types.observe(wrapper, "decoder")
        restore(wrapper)
        expected = tiny_types.observe(wrapper, "decoder")
    else:
        wrapper = get_peft_model(model, lora).eval()
        expected = tiny_types.observe(wrapper, "decoder")
        found = tiny_types.observe(convert(wrapper, whole).model, "decoder")
    assert any("lora_A" in name for name in expected.gradients)
    assert sweeps.difference(found, expected) < 1e-5
