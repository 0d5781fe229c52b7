"""A graft survives `save_pretrained` and `from_pretrained` of transformers, and is never loaded as a dense model."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graftwork.errors import CheckpointMismatchError, ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import Converted, save
from graftwork.grafting.marks import GraftConfig
from graftwork.methods.cald import Cald
from graftwork.methods.regrad import ReGrad
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from graftwork.methods.wt5 import WT5
from graftwork.pipeline.evaluation import resolve
from graftwork.pipeline.loading import load
from tiny_models import TINY, padded_batch, real_logits, tiny_model, word_tokenizer

GRAFTS = {
    "topk": ("t5", lambda: TopK(feed_forward_k=5)),
    "topk_attention": ("llama", lambda: TopK(attention_k=2)),
    "sparsefinder": ("bert", lambda: Sparsefinder(alpha=1.5)),
    "cald": ("bert", lambda: Cald(rank=4)),
    "regrad": ("llama", lambda: ReGrad(rank=2, b_std=0.5)),
}


def opened(folder: Path, family: str, **options: Any) -> Any:
    return getattr(transformers, TINY[family].model_class).from_pretrained(folder, **options)


@pytest.fixture
def graft(tmp_path: Path) -> tuple[Any, Path]:
    """A model with top-k attention, and the folder that its own `save_pretrained` wrote."""
    model = convert(tiny_model("llama"), TopK(attention_k=2)).model
    model.save_pretrained(tmp_path / "graft")
    return model, tmp_path / "graft"


@pytest.mark.parametrize("name", GRAFTS)
def test_from_pretrained_returns_the_graft_and_without_graftwork_refuses(name, tmp_path, monkeypatch):
    family, method = GRAFTS[name]
    batch = padded_batch(family)
    dense = real_logits(tiny_model(family), family, batch)
    model = convert(tiny_model(family), method()).model
    expected = real_logits(model, family, batch)
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path)
    again = opened(tmp_path, family)
    assert torch.equal(real_logits(again, family, batch), expected)
    # nothing remains of the quantizer, which would make the Trainer refuse the model
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again, "hf_quantizer")
    restore(again)
    assert torch.equal(real_logits(again, family, batch), dense)

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "graftwork")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "graftwork")
    with pytest.raises(ValueError, match="install Graftwork to load it"):
        opened(tmp_path, family)


def test_a_method_without_changes_writes_a_manifest_and_an_ordinary_model(tmp_path, monkeypatch):
    model = convert(tiny_model("t5"), WT5()).model
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert [method.name for method in load(tmp_path).methods] == ["wt5"]
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "graftwork")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "graftwork")
    assert torch.equal(opened(tmp_path, "t5").lm_head.weight, model.lm_head.weight)


def test_load_of_the_folder_and_of_a_run_and_from_pretrained_of_a_run_agree(graft, tmp_path):
    model, folder = graft
    batch = padded_batch("llama")
    expected = real_logits(model, "llama", batch)
    save(Converted(model, methods=resolve(model, None)[0].methods), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["quantization_config"]
    for found in (load(folder).model, load(tmp_path / "run").model, opened(tmp_path / "run" / "model", "llama")):
        assert torch.equal(real_logits(found, "llama", batch), expected)
    assert load(folder).methods[0].config == load(tmp_path / "run").methods[0].config


def test_restore_removes_mark_and_manifest(graft):
    model, folder = graft
    assert isinstance(model.config.quantization_config, GraftConfig)
    restore(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(folder)
    assert not (folder / "graftwork.json").exists()
    assert not {"quantization_config", "transformers_weights"} & set(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_saved_as_grafts(graft, tmp_path, duplicate):
    model, _ = graft
    duplicate(model).save_pretrained(tmp_path / "copy")
    batch = padded_batch("llama")
    found = opened(tmp_path / "copy", "llama")
    assert torch.equal(real_logits(found, "llama", batch), real_logits(model, "llama", batch))


def test_a_model_without_its_head_gets_the_learned_tensors(tmp_path):
    model = convert(tiny_model("bert"), Cald(rank=4)).model
    model.save_pretrained(tmp_path)
    batch = {name: value for name, value in padded_batch("bert").items() if name != "labels"}
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(**batch)[0], model.bert(**batch)[0])


def test_another_dtype_is_accepted(graft):
    _, folder = graft
    found = opened(folder, "llama", dtype=torch.float32)
    assert found.dtype == torch.float32
    assert [method.name for method in resolve(found, None)[0].methods] == ["topk"]


def test_changed_weights_a_missing_manifest_and_a_missing_tensor_are_refused(tmp_path):
    convert(tiny_model("bert"), Cald(rank=4)).model.save_pretrained(tmp_path / "whole")
    for name in ("changed", "bare", "partial"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    weights = tmp_path / "changed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointMismatchError, match="has changed since the model was saved"):
        opened(tmp_path / "changed", "bert")
    (tmp_path / "bare" / "graftwork.json").unlink()
    with pytest.raises(CheckpointMismatchError, match=r"Found no graftwork\.json"):
        opened(tmp_path / "bare", "bert")
    manifest = json.loads((tmp_path / "whole" / "graftwork.json").read_text())
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.1.attention.self.graftwork_" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    unverified = {name: manifest[name] for name in ("graftwork", "methods")}
    (tmp_path / "partial" / "graftwork.json").write_text(json.dumps(unverified))
    with pytest.raises(CheckpointMismatchError, match="missing: "):
        opened(tmp_path / "partial", "bert")


def test_a_configuration_of_a_graft_without_weights_is_refused(graft):
    model, _ = graft
    with pytest.raises(ConfigError, match="no files of weights"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_a_graft_that_other_code_has_switched_off_is_not_saved(graft, tmp_path):
    model, _ = graft
    model.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedModelError, match="save the model"):
        model.save_pretrained(tmp_path / "off")


def test_a_model_saved_within_a_training_is_not_run(graft, tmp_path):
    model, _ = graft
    model.train().model.layers[0].eval()
    model.save_pretrained(tmp_path / "training")
    assert "probe" not in json.loads((tmp_path / "training" / "graftwork.json").read_text())
    assert (model.training, model.model.layers[0].training) == (True, False)
    assert load(tmp_path / "training").methods


class Doubling(HfQuantizer):
    """Quantizer of a dense model for the test: doubles the weights of the output layer after loading."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.lm_head.weight.data *= 2
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class DoublingConfig(QuantizationConfigMixin):
    def __init__(self, quant_method: str = "doubling", factor: int = 2) -> None:
        self.quant_method, self.factor = quant_method, factor


def test_the_quantization_of_the_dense_model_is_nested(tmp_path, monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "doubling", Doubling)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "doubling", DoublingConfig)
    dense = tiny_model("llama")
    dense.config.quantization_config = DoublingConfig()
    model = convert(dense, TopK(attention_k=2)).model
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["base"] == {"quant_method": "doubling", "factor": 2}
    (tmp_path / "graftwork.json").write_text(json.dumps({"methods": [{"name": "topk", "attention_k": 2}]}))
    with torch.no_grad():
        model.lm_head.weight *= 2
    batch = padded_batch("llama")
    expected = real_logits(model, "llama", batch)
    for found in (opened(tmp_path, "llama"), load(tmp_path).model):
        assert torch.equal(real_logits(found, "llama", batch), expected)
        assert isinstance(found.hf_quantizer, Doubling)
        assert restore(found)
        assert isinstance(found.config.quantization_config, DoublingConfig)


def test_the_tokenizer_and_other_files_beside_a_graft_may_change(graft):
    _, folder = graft
    word_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("notes")
    assert load(folder).tokenizer is not None
