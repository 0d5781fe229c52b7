"""Loading restores a saved model exactly or raises an error."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import probe_model, save
from graftwork.grafting.method import Change
from graftwork.methods import NAMES
from graftwork.methods.topk import TopK
from graftwork.methods.topk.modules import TopKAttention
from graftwork.pipeline.loading import load
from graftwork.surgery.attention import graft_attention
from graftwork.surgery.sites import attention_sites
from tiny_models import padded_batch, real_logits, tiny_model, word_tokenizer

METHOD = TopK(feed_forward_k=6, attention_k=3)


@pytest.fixture
def run(tmp_path):
    model = tiny_model("t5", dtype=torch.float32)
    save(convert(model, METHOD, tokenizer=word_tokenizer()), tmp_path / "run")
    return tmp_path / "run"


def without_digests(run):
    """Rewrite the manifest as versions before digests wrote it."""
    file = run / "model" / "graftwork.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: manifest[key] for key in ("graftwork", "methods", "probe")}))


def expected():
    model = convert(tiny_model("t5", dtype=torch.float32), METHOD).model
    return real_logits(model, "t5", padded_batch("t5"))


def test_the_run_contains_changes_and_a_probe(run):
    record = json.loads((run / "conversion.json").read_text())
    assert len(record["changes"]) == 10
    assert {"path", "before", "after"} == record["changes"][0].keys()
    manifest = json.loads((run / "model" / "graftwork.json").read_text())
    assert manifest["methods"][0]["name"] == "topk"
    assert manifest["methods"][0]["feed_forward_k"] == 6
    assert manifest["probe"] == record["probe"]


def test_transformers_loads_the_checkpoint_without_graftwork(run):
    vanilla, report = AutoModelForSeq2SeqLM.from_pretrained(run / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    convert(vanilla, METHOD)
    assert torch.equal(real_logits(vanilla.eval(), "t5", padded_batch("t5")), expected())


@pytest.mark.parametrize("where", ["run", "run/model"])
def test_a_model_loads_from_its_run_or_its_model_folder(run, where):
    loaded = load(run.parent / where, strict=True)
    assert loaded.methods[0].config == METHOD.config
    assert not loaded.model.training
    assert torch.equal(real_logits(loaded.model, "t5", padded_batch("t5")), expected())


def test_loading_with_another_k_warns_with_both_values(run, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load(run, methods=[TopK(feed_forward_k=9, attention_k=3)])
    assert "topk.feed_forward_k was 6 and is now 9" in caplog.text
    assert "attention_k" not in caplog.text
    assert loaded.methods[0].config.feed_forward_k == 9
    assert not torch.equal(real_logits(loaded.model, "t5", padded_batch("t5")), expected())


def test_strict_loading_with_another_k_is_refused(run):
    with pytest.raises(CheckpointMismatchError, match="feed_forward_k was 6 and is now 9"):
        load(run, methods=[TopK(feed_forward_k=9, attention_k=3)], strict=True)


def test_loading_with_the_recorded_settings_logs_no_warning(run, caplog):
    with caplog.at_level(logging.WARNING):
        load(run, methods=[METHOD], strict=True)
    assert "settings" not in caplog.text


def test_loading_without_the_method_warns(run, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load(run, methods=[])
    assert "feed_forward_k was 6 and is now absent" in caplog.text
    assert loaded.methods == ()


def test_weights_changed_after_saving_are_refused(run):
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["shared.weight"] = tensors["shared.weight"] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors has changed"):
        load(run)
    without_digests(run)
    with pytest.raises(CheckpointMismatchError, match="answers a fixed input differently"):
        load(run)


def test_a_manifest_changed_after_saving_is_refused(run):
    file = run / "model" / "graftwork.json"
    manifest = json.loads(file.read_text())
    manifest["methods"][0]["feed_forward_k"] = 1
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatchError, match=r"graftwork\.json has changed since it was written"):
        load(run)
    # a version that recorded no digest of the manifest itself
    manifest.pop("sha256")
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatchError, match="answers a fixed input differently"):
        load(run)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_missing_and_unexpected_tensors_are_refused(run, change):
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors["encoder.block.1.layer.1.learned.weight"] = tensors[name].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    without_digests(run)
    with pytest.raises(CheckpointMismatchError, match=f"{change}: encoder.block.1"):
        load(run, dtype="float32")


class Scaled(nn.Module):
    """Dense attention multiplied by a learned scalar."""

    def __init__(self):
        super().__init__()
        self.dense = TopKAttention(None)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, *inputs, **options):
        return self.factor * self.dense(*inputs, **options)


class Scale(TopK):
    """Method with learned parameters."""

    name = "scale"

    def apply(self, model):
        sites = attention_sites(model)
        graft_attention(model, self.name, {site.path: Scaled() for site in sites})
        return [Change(site.path, "T5Attention", "Scaled") for site in sites]


def test_learned_parameters_of_a_method_load_without_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(NAMES._entries, "scale", Scale)
    model = tiny_model("t5", dtype=torch.float32)
    converted = convert(model, Scale(), tokenizer=word_tokenizer())
    learned = [parameter for name, parameter in model.named_parameters() if name.endswith("factor")]
    assert len(learned) == 6
    with torch.no_grad():
        for index, parameter in enumerate(learned):
            parameter += 0.1 * (index + 1)
    converted.save(tmp_path)
    # the log of transformers does not propagate to caplog, and other tests may have disabled it
    library = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(library, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, library.name)
    loaded = load(tmp_path, strict=True, dtype="float32")
    assert "factor" not in caplog.text
    # without the mark, as in runs of earlier versions, transformers loads the dense model and reports the others
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({key: config[key] for key in config.keys() - {"quantization_config", "transformers_weights"}})
    )
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert "LOAD REPORT" in caplog.text
    assert "factor" in caplog.text
    assert torch.equal(*(real_logits(each, "t5", padded_batch("t5")) for each in (loaded.model, model)))


def test_a_kill_between_two_renames_is_recovered(run):
    (run / "model").rename(run / "model.old")
    assert torch.equal(real_logits(load(run).model, "t5", padded_batch("t5")), expected())


def test_saving_twice_replaces_the_model(run):
    loaded = convert(load(run), TopK(feed_forward_k=2))
    loaded.save(run)
    again = load(run, strict=True)
    assert again.methods[0].config == TopK(feed_forward_k=2).config
    names = {path.name for path in run.iterdir()} - {".lock", "train.lock"}
    assert sorted(names) == ["conversion.json", "model", "run.yaml"]


def test_loading_a_run_without_a_model_names_the_missing_command(tmp_path):
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(IncompleteRunError, match="graftwork convert"):
        load(tmp_path)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Cannot load a model"):
        load(tmp_path)


def test_the_probe_keeps_the_training_mode_and_detects_small_changes():
    model = tiny_model("llama").train()
    first = probe_model(model)
    assert model.training
    assert probe_model(model) == first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert probe_model(model)["hash"] != first["hash"]


def test_loading_in_another_dtype_works(run):
    loaded = load(run, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_gives_the_same_logits(run, device_map):
    loaded = load(run, device_map=device_map)
    assert torch.equal(real_logits(loaded.model, "t5", padded_batch("t5")), expected())


def test_a_device_map_with_layers_on_disk_gives_the_same_logits(run, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
    import accelerate

    parts = {name: "cpu" for name, _ in model.named_children()}
    parts["decoder"] = "disk"
    accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path / "disk")
    convert(model, METHOD)
    assert model.decoder.block[0].layer[2].DenseReluDense.wi.weight.device.type == "meta"
    torch.testing.assert_close(real_logits(model, "t5", padded_batch("t5")), expected(), rtol=1e-5, atol=1e-5)
