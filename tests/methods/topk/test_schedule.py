"""k by layer: lists, ranges, and shares of the activation mass that are calibrated on examples."""

import pytest
import torch

import graftwork as gw
from graftwork.core.example import Example
from graftwork.errors import ConfigError
from graftwork.grafting.capabilities import Calibrates
from graftwork.methods.topk.calibration import Curve
from graftwork.methods.topk.functional import topk_attention_statistics
from graftwork.methods.topk.modules import TopKAttention, TopKFeedForward
from graftwork.methods.topk.schedule import by_layer, kept_share
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import undo_steps
from tiny_models import padded_batch, real_logits, tiny_model, word_tokenizer

ROWS = [Example(str(number), "a b c d e f g h"[: 2 * number + 3], "a b") for number in range(6)]


def kept(model, kind):
    return [module.k for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (64, None),
        ("auto:0.9", None),
        ((3, None, 5), {0: 3, 1: None, 2: 5}),
        ("0-1:8,3:2", {0: 8, 1: 8, 3: 2}),
        ("0:0.5", {0: 0.5}),
    ],
)
def test_lists_and_ranges_name_one_number_for_each_layer(setting, expected):
    assert by_layer(setting, "k") == expected


def test_shares_are_read():
    assert kept_share("auto:0.95", "k") == 0.95
    assert kept_share("0:5", "k") is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"attention_k": "auto:1.5"}, r"attention_k is 'auto:1\.5'.*share above 0 and below 1"),
        ({"attention_k": "auto:x"}, r"auto:0\.95"),
        ({"attention_k": "sixty"}, "Expected a number, a list"),
        ({"attention_k": "0-3:64,2:5"}, "names layer 2 twice"),
        ({"attention_k": "0:0.5"}, r"attention_k is 0\.5"),
        ({"attention_k": (4, 0)}, "attention_k is 0"),
        ({"feed_forward_k": (4, 1.5)}, r"feed_forward_k is 1\.5"),
        ({"feed_forward_k": (None, None)}, "changes no layer"),
        ({"attention_k": 4, "attention_window": 0}, "attention_window is 0"),
        ({"feed_forward_k": 4, "attention_sinks": 4}, "attention keeps all keys"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        gw.TopK(**settings)


def test_a_list_sets_k_for_each_layer_and_leaves_out_null():
    model = tiny_model("llama", num_hidden_layers=3)
    converted = gw.convert(model, gw.TopK(attention_k=[4, None, 2], feed_forward_k="0:0.5,1:3"))
    assert kept(model, TopKAttention) == [4, 2]
    assert kept(model, TopKFeedForward) == [12, 3]
    assert [change.path for change in converted.changes] == [
        "model.layers.0.self_attn",
        "model.layers.2.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def test_equal_numbers_in_a_list_are_one_number():
    batch = padded_batch("t5")
    first, second = (tiny_model("t5") for _ in range(2))
    gw.convert(first, gw.TopK(attention_k=[3, 3], feed_forward_k="0-1:5"))
    gw.convert(second, gw.TopK(attention_k=3, feed_forward_k=5))
    assert torch.equal(real_logits(first, "t5", batch), real_logits(second, "t5", batch))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"attention_k": [1, 2, 3]}, "attention_k has 3 numbers. Expected 2"),
        ({"feed_forward_k": "0-2:4"}, "names layer 2. Expected layers from 0 to 1"),
    ],
)
def test_lists_of_another_length_are_refused_unchanged(settings, match):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=match):
        gw.convert(model, gw.TopK(**settings))
    assert not undo_steps(model)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_first_and_recent_keys_are_refused_outside_causal_attention(name):
    model = tiny_model(name)
    with pytest.raises(ConfigError, match=r"attention_sinks is 2.*is not causal self-attention"):
        gw.convert(model, gw.TopK(attention_k=3, attention_sinks=2))
    with pytest.raises(ConfigError, match="attention_window is 2"):
        gw.convert(model, gw.TopK(attention_k=3, attention_window=2))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_cached_generation_keeps_first_and_recent_keys(name):
    model, batch = tiny_model(name), padded_batch(name)
    batch.pop("labels")
    plain = gw.convert(tiny_model(name), gw.TopK(attention_k=1)).model
    gw.convert(model, gw.TopK(attention_k=1, attention_sinks=2, attention_window=2))
    assert "first=2, recent=2" in repr(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    # the embedding of padding is zero, so that all scores of its query are ties
    options |= {"return_dict_in_generate": True, "suppress_tokens": [0]}
    cached, uncached = (model.generate(**batch, use_cache=use_cache, **options) for use_cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-9, atol=1e-9)
    other = plain.generate(**batch, **options)
    assert (torch.stack(other.logits) - torch.stack(cached.logits)).abs().max() > 1e-3


def test_the_curve_is_the_kept_mass_of_the_statistics():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = LazyMask(2, 9, 9, causal=True)
    curve = Curve(first=0, recent=0)
    curve.add(None, (None, query, key, None, mask), {"scaling": 0.9, "position_bias": None})
    mean = curve.total / curve.count
    for k in range(1, 10):
        expected = topk_attention_statistics(query, key, k=k, scale=0.9, mask=mask).kept_mass.mean()
        torch.testing.assert_close(mean[k - 1], expected, rtol=1e-9, atol=1e-9)


def test_the_curve_of_batches_of_different_lengths_is_the_mean_over_their_queries():
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(1, 2, tokens, 5, generator=generator, dtype=torch.float64) for tokens in (4, 9, 6)]
    curve = Curve(first=0, recent=0)
    for query in calls:
        mask = LazyMask(1, query.shape[2], query.shape[2])
        curve.add(None, (None, query, query, None, mask), {"scaling": 0.9, "position_bias": None})
    masses = [topk_attention_statistics(query, query, k=5, scale=0.9).kept_mass.mean() for query in calls]
    expected = sum(mass * query.shape[2] for mass, query in zip(masses, calls, strict=True)) / 19
    torch.testing.assert_close(curve.total[4] / curve.count, expected, rtol=1e-9, atol=1e-9)
    assert curve.smallest(float(expected) - 1e-9) == 8


def test_the_curve_counts_first_and_recent_keys():
    query = torch.randn(1, 1, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = LazyMask(1, 9, 9, causal=True)
    curve = Curve(first=2, recent=2)
    curve.add(None, (None, query, query, None, mask), {"scaling": 0.9, "position_bias": None})
    weights = torch.softmax((0.9 * query @ query.mT).masked_fill(~mask.dense(), -torch.inf), -1)
    options = {"k": 1, "scale": 0.9, "mask": mask, "first": 2, "recent": 2}
    indices = topk_attention_statistics(query, query, **options).indices
    kept_weights = torch.where(indices < 0, 0.0, weights.gather(-1, indices.clamp_min(0).long()))
    torch.testing.assert_close(curve.total[0] / curve.count, kept_weights.sum(-1).mean())


def test_padding_does_not_count():
    padding = torch.tensor([[True] * 4, [True, True, False, False]])
    mask = LazyMask(2, 4, 4, padding=padding)
    query = torch.randn(2, 3, 4, 5)
    curve = Curve(first=0, recent=0)
    curve.add(None, (None, query, query, None, mask), {"scaling": 0.9, "position_bias": None})
    assert curve.count == 3 * 6


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "distilbert"])
def test_calibration_chooses_the_smallest_number_with_the_share(name):
    model, batch = tiny_model(name), padded_batch(name)
    dense = real_logits(model, name, batch)
    method = gw.TopK(attention_k="auto:0.999999", feed_forward_k="auto:0.9")
    assert isinstance(method, Calibrates)
    assert method.needs_calibration
    calibrated = method.calibrate(model, word_tokenizer(), ROWS)
    assert torch.equal(real_logits(model, name, batch), dense)
    assert not undo_steps(model)
    assert not calibrated.needs_calibration
    assert all(k % 8 == 0 for k in calibrated.config.attention_k)
    assert len(calibrated.config.feed_forward_k) == 2
    assert method.matches(calibrated.config)
    assert not method.matches(gw.TopK(attention_k=4, feed_forward_k=4, layers="0").config)
    gw.convert(model, calibrated)
    inputs = word_tokenizer()([row.input for row in ROWS], return_tensors="pt", padding=True)
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    targets = word_tokenizer()([f"{row.target} [EOS]" for row in ROWS], return_tensors="pt", padding=True)
    if name == "t5":
        batch["labels"] = targets["input_ids"]
    masses = {
        path: value for path, value in calibrated.measure(model, batch).items() if path.startswith("kept_mass/encoder")
    }
    assert all(value >= 0.9 - 1e-6 for value in masses.values())
    if name in ("llama", "bert"):
        # one step of the multiples less keeps less than the share
        smaller = [max(1, k - 8) for k in calibrated.config.feed_forward_k]
        gw.convert(model, gw.TopK(feed_forward_k=smaller))
        measured = calibrated.measure(model, batch)
        assert all(value < 0.9 for path, value in measured.items() if path.startswith("kept_mass"))


def test_calibration_leaves_unselected_layers_dense():
    method = gw.TopK(attention_k="auto:0.9", layers="1")
    assert method.calibrate(tiny_model("llama"), word_tokenizer(), ROWS).config.attention_k == (None, 8)


def test_calibration_needs_examples_and_dense_layers():
    method = gw.TopK(attention_k="auto:0.9")
    with pytest.raises(ConfigError, match="no example"):
        method.calibrate(tiny_model("llama"), word_tokenizer(), [])
    model = tiny_model("llama")
    gw.convert(model, gw.TopK(attention_k=2))
    with pytest.raises(ConfigError, match=r"graftwork\.restore"):
        method.calibrate(model, word_tokenizer(), ROWS)
    with pytest.raises(ConfigError, match=r"auto is calibrated from examples.*Nothing was changed"):
        gw.convert(tiny_model("llama"), method)


def test_a_calibrated_model_is_saved_and_loaded(tmp_path):
    method = gw.TopK(attention_k="auto:0.9", feed_forward_k=[3, 0.5])
    model = tiny_model("llama", dtype=torch.float32)
    converted = gw.convert(model, method.calibrate(model, word_tokenizer(), ROWS), tokenizer=word_tokenizer())
    converted.save(tmp_path / "run")
    assert gw.load(tmp_path / "run", strict=True).methods[0].config == converted.methods[0].config
