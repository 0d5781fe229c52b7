"""Models that compute in float32 in place of the 16-bit type of their checkpoint, where the CPU has no instructions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import graftwork
from graftwork.core import devices
from graftwork.core.files import read_json
from graftwork.core.run_folder import MANIFEST_FILE
from graftwork.grafting.conversion import restore
from graftwork.grafting.identity import matches_digest, weights_digest
from graftwork.grafting.precision import as_stored, is_exact, stored_types, widen
from graftwork.methods import NAMES
from tiny_models import tiny_model, word_tokenizer

CASES = [
    ("topk", "llama", {"feed_forward_k": 8, "attention_k": 4}),
    ("sparsefinder", "bert", {"alpha": 1.5}),
    ("cald", "roberta", {"rank": 8}),
    ("wt5", "t5", {}),
    ("regrad", "llama", {"rank": 2, "layers": "1"}),
]
"""A case of every method."""


@pytest.fixture
def lacking(monkeypatch):
    """A CPU without instructions for 16-bit types."""
    monkeypatch.setattr(devices, "accelerators", tuple)
    monkeypatch.setattr(devices, "has_instructions", lambda dtype: False)


@pytest.fixture
def having(monkeypatch):
    """A CPU with instructions for 16-bit types."""
    monkeypatch.setattr(devices, "accelerators", tuple)
    monkeypatch.setattr(devices, "has_instructions", lambda dtype: True)


def saved(folder, family, dtype=torch.bfloat16):
    tiny_model(family).to(dtype).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def kinds(model):
    return {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}


@pytest.mark.parametrize(("name", "family", "settings"), CASES, ids=[case[0] for case in CASES])
def test_a_graft_computes_in_float32_and_is_stored_as_its_checkpoint(name, family, settings, tmp_path, monkeypatch):
    method = NAMES.get(name)
    method = method(method.config_class(**settings))
    base = saved(tmp_path / "base", family)
    monkeypatch.setattr(devices, "accelerators", tuple)
    digests, files, runs = [], [], []
    for has in (True, False):
        monkeypatch.setattr(devices, "has_instructions", lambda dtype, has=has: has)
        converted = graftwork.convert(graftwork.load(base), method)
        run = converted.save(tmp_path / f"run-{has}")
        digests.append(converted.digest())
        files.append(load_file(run / "model" / "model.safetensors"))
        runs.append(run)
    # the same files and the same identity, whatever the CPU has
    assert digests[0] == digests[1] == read_json(runs[1] / "model" / MANIFEST_FILE)["digest"]
    assert {key: value.dtype for key, value in files[0].items()} == {key: v.dtype for key, v in files[1].items()}
    assert torch.bfloat16 in {value.dtype for value in files[1].values()}
    loaded = graftwork.load(runs[0])
    assert kinds(loaded.model) == {torch.float32}
    assert loaded.digest() == digests[0]
    restore(loaded)
    assert kinds(loaded.model) == {torch.float32}
    loaded.model(**({"input_ids": torch.arange(5)[None]} | _decoder(loaded.model)))


def _decoder(model):
    return {"decoder_input_ids": torch.arange(3)[None]} if model.config.is_encoder_decoder else {}


def test_outputs_are_those_of_the_checkpoint_in_float32(lacking, tmp_path):
    model, _ = graftwork.load_model(str(saved(tmp_path, "llama")))
    wide, _ = graftwork.load_model(str(tmp_path), dtype="float32")
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, wide(ids).logits)
    assert weights_digest(model) != weights_digest(wide)
    kept, _ = graftwork.load_model(str(tmp_path), dtype="bfloat16")
    assert weights_digest(model) == weights_digest(kept)


def test_weights_that_were_trained_are_stored_in_float32(lacking, tmp_path):
    converted = graftwork.load(saved(tmp_path / "base", "llama"))
    with torch.no_grad():
        converted.model.lm_head.weight[0, 0] += 1e-4
    assert stored_types(converted.model) == {}
    run = converted.save(tmp_path / "run")
    tensors = load_file(run / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    again = graftwork.load(run)
    assert torch.equal(again.model.lm_head.weight, converted.model.lm_head.weight)
    assert again.digest() == converted.digest()


def test_save_pretrained_of_a_graft_writes_the_type_of_its_checkpoint(lacking, tmp_path):
    method = NAMES.get("topk")
    converted = graftwork.convert(
        graftwork.load(saved(tmp_path / "base", "llama")), method(method.config_class(feed_forward_k=8))
    )
    converted.model.save_pretrained(tmp_path / "graft")
    tensors = load_file(tmp_path / "graft" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert kinds(converted.model) == {torch.float32}
    # also when Graftwork itself calls it, within the same context
    converted.save(tmp_path / "run")
    assert kinds(converted.model) == {torch.float32}
    assert graftwork.load(tmp_path / "graft").digest() == graftwork.load(tmp_path / "run").digest()


def test_contexts_nest_and_keep_the_parameters_themselves():
    model = tiny_model("t5").to(torch.bfloat16)
    before = weights_digest(model)
    widen(model)
    parameters = list(model.parameters())
    with as_stored(model):
        with as_stored(model):
            assert kinds(model) == {torch.bfloat16}
        assert kinds(model) == {torch.bfloat16}
    assert kinds(model) == {torch.float32}
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert weights_digest(model) == before


def test_digests_of_one_checkpoint_match_in_every_type(lacking, tmp_path):
    folder = str(saved(tmp_path, "llama"))
    wide, _ = graftwork.load_model(folder, dtype="float32")
    stored, _ = graftwork.load_model(folder)
    for recorded in (weights_digest(wide), weights_digest(stored)):
        assert matches_digest(wide, recorded)
        assert matches_digest(stored, recorded)
    with torch.no_grad():
        wide.lm_head.weight[0, 0] += 1e-4
    assert not is_exact(wide, {"lm_head.weight": torch.bfloat16})
    assert not matches_digest(wide, weights_digest(stored))


def test_results_say_in_which_type_they_were_computed(lacking, tmp_path, offline_world):
    from graftwork.settings.evaluation import EvaluationSettings

    settings = EvaluationSettings(tasks=("world/facts",), limit=2, max_new_tokens=2)
    data = offline_world / "unifiedqa"
    folder = graftwork.load(saved(tmp_path / "base", "t5")).save(tmp_path / "run")
    (row,) = graftwork.evaluate(folder, settings=settings, data=data, run=folder).rows
    assert (row.device, row.dtype) == ("cpu", "float32")
