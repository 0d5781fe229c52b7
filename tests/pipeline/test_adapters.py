"""Adapter folders of PEFT are opened as their base model with the adapter merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graftwork.cli.app import run as graftwork
from graftwork.demo import shipped_model
from graftwork.errors import CheckpointMismatchError, ConfigError, GraftworkError
from graftwork.grafting.conversion import convert
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load, load_model
from peft_adapters import TARGETS, adapted

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 11, 40, 2, 7]])


def logits(model: nn.Module) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


@pytest.fixture
def folder(tmp_path) -> Path:
    """Adapter of the shipped decoder."""
    wrapped = adapted(load(shipped_model("decoder"), dtype="float32").model, "decoder")
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(folder: Path, **changes: object) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_folder_is_loaded_as_its_base_model_with_the_adapter(kind, tmp_path, capsys):
    wrapped = adapted(load(shipped_model(kind), dtype="float32").model, kind)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    model, tokenizer = load_model(str(tmp_path / "adapter"), dtype="float32")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert tokenizer("who", return_tensors="pt")["input_ids"].numel()
    assert not any("lora" in name for name in model.state_dict())
    assert capsys.readouterr().err.count("Merged the adapter in ") == 1
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole").model), expected, atol=1e-5, rtol=0)


def test_an_adapter_folder_is_converted_evaluated_and_started_from_again(folder, tmp_path, capsys):
    words = ("convert", "topk", folder, "--feed-forward-k", 16, "-o", tmp_path / "run", "--dtype", "float32")
    assert graftwork([str(word) for word in words]) == 0
    base, _ = load_model(str(folder), dtype="float32")
    expected = logits(convert(base, TopK(feed_forward_k=16)).model)
    assert torch.equal(logits(load(tmp_path / "run").model), expected)
    assert f"model: {folder.resolve()}" in (tmp_path / "run" / "run.yaml").read_text()
    assert graftwork(["predict", str(folder), "where is the baker ?", "--max-new-tokens", "2"]) == 0


def test_an_adapter_of_a_graft_is_loaded_onto_the_graft(tmp_path):
    graft = convert(load(shipped_model("decoder"), dtype="float32"), TopK(attention_k=2))
    graft.model.save_pretrained(tmp_path / "graft")
    wrapped = adapted(load(tmp_path / "graft").model, "decoder")
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert [method.name for method in loaded.methods] == ["topk"]
    torch.testing.assert_close(logits(loaded.model), expected, atol=1e-5, rtol=0)
    loaded.save(tmp_path / "run")
    torch.testing.assert_close(logits(load(tmp_path / "run").model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/model"}, "its base model '/nowhere/model' does not exist here"),
        ({"base_model_name_or_path": shipped_model("encoder")}, "Expected an adapter that was trained on this model"),
        ({"target_modules": ["q_proj"]}, "found an unknown tensor .*down_proj"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "found no tensor .*up_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_model_is_one_line(folder, changes, message):
    changed(folder, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_incomplete_adapter_folders_are_refused(folder, tmp_path):
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(CheckpointMismatchError, match="is damaged"):
        load(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"found no adapter_model\.safetensors"):
        load(folder)
    weights.write_bytes(whole)
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="is an adapter too"):
        load(changed(other, base_model_name_or_path=str(folder)))


def test_an_adapter_that_changes_no_weights_is_refused(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load(shipped_model("decoder")).model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(GraftworkError, match="its type is PROMPT_TUNING, which changes no weights"):
        load(tmp_path / "prompt")


def test_a_wrapped_model_is_not_saved_as_a_run_without_its_weights(tmp_path):
    graft = convert(load(shipped_model("decoder")), TopK(attention_k=2))
    with pytest.raises(ConfigError, match=r"it is wrapped by PEFT.*merge_and_unload"):
        replace(graft, model=adapted(graft.model, "decoder")).save(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
