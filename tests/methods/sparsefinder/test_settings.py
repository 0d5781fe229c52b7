"""Settings without effect are refused in new conversions, and loading and varying recorded ones still works."""

from dataclasses import fields

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.effects import CONDITIONS, check_effects
from graftwork.methods.sparsefinder.modules import AttentionCall, observe_calls, sparsefinder_modules
from tiny_models import padded_batch, tiny_model

WITHOUT_EFFECT = [
    {"grouping": "kmeans", "threshold": 1.5},
    {"grouping": "window", "window_size": 3, "distance": "cos"},
    {"grouping": "distance", "threshold": 1.0, "target_sparsity": 0.9},
    {"grouping": "distance", "threshold": 1.0, "num_clusters": 8},
    {"grouping": "kmeans", "bucket_size": 8},
    {"grouping": "quantize", "temperature": 0.5},
    {"grouping": "routing", "cluster_rounds": 2},
    {"grouping": "bigbird", "hash_rounds": 2},
    {"grouping": "gold", "block_size": 4},
    {"grouping": "gold", "samples": 10},
    {"grouping": "kmeans", "skip_projectors": True, "rounds": 8},
    {"grouping": "kmeans", "exclude_fixed": True},
    {"grouping": "window", "window_size": 3, "executor": "dense", "attention_block_size": 16},
    {"grouping": "window", "window_size": 3, "executor": "flex", "exact_blocks": False},
    {"grouping": "window", "window_size": 3, "attention_kinds": ("self",), "cross_patterns": True},
    {"grouping": "distance", "threshold": 1.0, "sort_tokens": True},
    {"grouping": "kmeans", "executor": "flex", "sort_tokens": True},
    {"grouping": "kmeans", "exact_blocks": False, "sort_tokens": True},
    {"grouping": "kmeans", "block_size": 2, "sort_tokens": True},
    {"window_size": 3},
    {"executor": "flex"},
    {"grouping": "kmeans", "finetune": False, "learnable_alpha": True},
    {"grouping": "kmeans", "finetune": False, "anneal_steps": 10},
]


@pytest.mark.parametrize("settings", WITHOUT_EFFECT, ids=lambda settings: "-".join(map(str, settings)))
def test_a_setting_without_effect_is_refused_by_name(settings):
    # the last setting of each case has no effect
    name = list(settings)[-1]
    with pytest.raises(ConfigError, match=rf"^{name} is .*no effect\. It needs"):
        convert(tiny_model("bert"), Sparsefinder(**settings))


def test_conditions_are_of_settings_and_defaults_pass():
    assert set(CONDITIONS) <= {field.name for field in fields(SparsefinderConfig)}
    for grouping in (None, "gold", "kmeans", "quantize", "reformer", "routing", "bigbird", "longformer"):
        check_effects(SparsefinderConfig(grouping=grouping))


def test_a_recorded_run_with_such_a_setting_still_loads(tmp_path):
    import graftwork as gw
    from graftwork.grafting.conversion import attach, converted_of
    from tiny_models import word_tokenizer

    model = tiny_model("bert", dtype=torch.float32)
    attach(model, Sparsefinder(grouping="kmeans", num_clusters=2, threshold=1.5))
    converted_of(model, word_tokenizer()).save(tmp_path / "run")
    loaded = gw.load(tmp_path / "run")
    assert loaded.methods[0].config.threshold == 1.5


def test_gold_with_a_window_is_their_union():
    batch, calls = padded_batch("bert"), []
    gold = {"grouping": "gold", "add_cls_mask": True, "window_size": 3}
    model = convert(tiny_model("bert"), Sparsefinder(**gold)).model
    alone = convert(tiny_model("bert"), Sparsefinder(grouping="gold")).model
    window = convert(tiny_model("bert"), Sparsefinder(**{**gold, "grouping": "window"})).model

    def observer(graft, call: AttentionCall):
        calls.append((graft, call))

    with observe_calls(model, observer), torch.no_grad():
        model(**batch)
    names = list(sparsefinder_modules(model))
    assert len(calls) == len(names)
    for (graft, call), name in zip(calls, names, strict=True):
        union, edges, fixed = (
            sparsefinder_modules(one)[name].current_graph(call).dense() for one in (model, alone, window)
        )
        assert torch.equal(union, edges | fixed)
        assert (union & ~edges).any()
        assert (union & ~fixed).any()
        assert graft.rule.config.grouping == "gold"
    measured = Sparsefinder(**gold).measure(model, batch)
    assert {value for key, value in measured.items() if key.startswith("recall/")} == {1.0}
    bare = Sparsefinder(grouping="gold").measure(alone, batch)
    for name in names:
        assert measured[f"sparsity/{name}"] < bare[f"sparsity/{name}"] == bare[f"gold_sparsity/{name}"]
