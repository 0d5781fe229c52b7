"""Comparison of mixers before training, and `graftwork calibrate`."""

import json

import pytest
import torch

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald, reference
from graftwork.methods.cald.calibration_page import calibrate
from graftwork.methods.cald.comparison import compare_mixers
from methods.cald.runs import model
from methods.cald.test_commands import graftwork, place
from methods.cald.test_decoders import decoder
from tiny_models import word_tokenizer

__all__ = ["place"]


def batches(count, tokens=12, padded=True):
    """Random batches of two rows, of which the second is shorter."""
    generator = torch.Generator().manual_seed(count)
    found = []
    for _ in range(count):
        ids = torch.randint(4, 64, (2, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, tokens - 4 :] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def first_layer_error(found, batch, rank):
    """Relative error of segment means in the first layer, by the definition of Linformer and of softmax attention."""
    attention = found.bert.encoder.layer[0].attention.self
    states = found.bert.embeddings(batch["input_ids"]).double()
    weights = {
        name: (getattr(attention, name).weight.double(), getattr(attention, name).bias.double())
        for name in ("query", "key", "value")
    }
    slots = torch.arange(16) * rank // 16
    matrix = torch.nn.functional.one_hot(slots, rank).double()
    wrong = whole = 0.0
    for h, m in zip(states, batch["attention_mask"].bool(), strict=True):
        mixed = reference.attention(h, weights, matrix, matrix, m, 2, "slot_mean", slots, True)
        q, k, v = (h @ weight.T + bias for weight, bias in weights.values())
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            scores = (q[:, part] @ k[:, part].T / 8**0.5).masked_fill(~m, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        dense = torch.cat(heads, -1)
        wrong += float((mixed - dense)[m].square().sum())
        whole += float(dense[m].square().sum())
    return wrong / whole


@torch.no_grad()
def test_errors_are_those_of_the_definition_and_guided_updates_reduce_them():
    dense = model()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    sample = batches(1)
    methods = {
        "means": Cald(rank=4, positions=16),
        "dense": Cald(rank=16, initialization="identity", positions=16),
        "shared": Cald(rank=4, positions=16, share="layer"),
        "svd": Cald(rank=4, positions=16, initialization="svd"),
        "parameter-free": Cald(mixer="feature_map"),
    }
    with torch.enable_grad():
        found = compare_mixers(dense, methods, sample, sample, guided_updates=8)
    means, identity, shared, svd, free = found.choices
    assert means.errors[0] == pytest.approx(first_layer_error(dense, sample[0], 4), rel=1e-4)
    assert identity.error < 1e-9
    assert identity.distance < 1e-9
    assert means.distances[0] == 0
    assert means.distance == pytest.approx(distance(dense, methods["means"], sample[0]), rel=1e-4)
    assert means.guided_error < 0.9 * means.error
    assert shared.errors == pytest.approx(means.errors)
    assert shared.guided_errors != pytest.approx(means.guided_errors)
    assert svd.guided_error < svd.error
    assert free.guided_errors == ()
    assert len(found.layers) == 2
    assert found.update_ratios["target, waypoint, hybrid"] > 1
    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def distance(dense, method, batch):
    """Sum over hidden states of the mean squared difference of real tokens, with every layer converted."""
    expected = dense(**batch, output_hidden_states=True).hidden_states
    student = convert(model(), method).model
    found = student(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    return sum(float((one[real] - other[real]).square().mean()) for one, other in zip(found, expected, strict=True))


def test_a_window_over_the_whole_text_has_no_error():
    methods = {f"{size}": Cald(mixer="linear", window=size, feature_map="elu") for size in (2, 12)}
    found = compare_mixers(decoder(), methods, batches(1), batches(1), guided_updates=0)
    short, whole = found.choices
    assert whole.error < 1e-12 < 1e-4 < short.error
    assert whole.distance < 1e-12
    assert short.guided_errors == ()


def test_the_command_writes_a_page_and_refuses_options_without_effect(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words = ("calibrate", "encoder", "--task", "train.csv", "--guided-updates", 2, "-o", tmp_path / "page")
    code, out, err = graftwork(capsys, *words, "--rank", "2,4", "--json")
    assert code == 0, err
    rows = json.loads(out)
    starts = [f"{start}, rank {rank}" for rank in (2, 4) for start in ("segment_mean", "gaussian", "svd")]
    assert [row["choice"] for row in rows] == [*starts, "feature_map", "segment_mean, rank auto:0.95"]
    stored = json.loads((tmp_path / "page" / "calibration.json").read_text())
    assert [f"{sum(one['errors']) / 2:.3g}" for one in stored["choices"]] == [row["attention error"] for row in rows]
    page = (tmp_path / "page" / "calibration.html").read_text()
    assert "<svg" in page
    assert all(text.split(":")[0] in page for text in stored["findings"])
    code, _, err = graftwork(capsys, *words, "--window", "4")
    assert (code, "window is" in err or "windows is set" in err) == (2, True)
    code, _, err = graftwork(capsys, *words, "--rank", "0")
    assert (code, "rank is '0'" in err) == (2, True)
    converted = convert(model(), Cald(rank=4), tokenizer=word_tokenizer())
    with pytest.raises(ConfigError, match="Expected a dense one"):
        calibrate(converted, ["train.csv"])
    with pytest.raises(UnsupportedModelError, match="layers 7"):
        calibrate(convert(model(), Cald(guide="dense"), tokenizer=word_tokenizer()), ["train.csv"], layers="7")
