"""Adapters written for PEFT give the logits of Graftwork's own answers when PEFT loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graftwork.cli.app import run as graftwork
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.grafting.peft_folder import LowRankChange, write_peft_folder
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering.adapter_export import export, write_adapter
from graftwork.methods.regrad.answering.gradient_retrieval import GradientRetriever
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import encode_passages
from graftwork.methods.regrad.modules import adapters, updated
from graftwork.methods.regrad.text.requests import Question
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load, load_model
from graftwork.retrieval.embedded import build_embedded
from regrad_engine import SETTINGS, encoder_of, passages
from tiny_models import tiny_model
from tiny_types import build

peft = pytest.importorskip("peft")
QUESTION = "where was the garden of the river ?"
IDS = torch.tensor([[5, 9, 11, 40, 2, 7]])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run with a bank, beside an index of the same passages."""
    folder = tmp_path_factory.mktemp("adapters")
    converted = convert(load(shipped_model("decoder"), dtype="float32"), ReGrad(**SETTINGS))
    converted.save(folder / "run")
    some = [replace(one, text=f"{one.text} garden river") for one in passages(converted, 6)]
    encoder = encoder_of(converted)
    encode_passages(encoder, encoder.open_bank(folder / "run" / "artifacts" / "bank", precision="float32"), some)
    rows = ({"id": one.id, "text": one.text, "title": one.title} for one in some)
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_embedded(folder / "corpus.jsonl", folder / "index")
    return folder


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def served(folder: Path) -> nn.Module:
    """The pretrained model that the adapter names, with the adapter, as other programs open it."""
    base, _ = load_model(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    return peft.PeftModel.from_pretrained(base.float(), folder).eval()


def own(run: Path, question: Question, index: Path | None = None) -> torch.Tensor:
    """Logits of the prompt of an answer with its update."""
    from graftwork.retrieval import open_index

    converted = load(run)
    with GradientBank(run / "artifacts" / "bank") as bank:
        retriever = None if index is None else open_index(index)
        [found] = GradientRetriever(encoder_of(converted), bank, retriever).retrieve([question])
    assert found.delta is not None
    with updated(converted.model, found.delta[None]):
        return logits(converted.model)


def test_the_update_of_a_question_gives_the_logits_of_its_answer_in_peft(place, tmp_path, capsys):
    words = ("bank", "adapter", place / "run", "-o", tmp_path / "a", "--question", QUESTION, "--index", place / "index")
    assert graftwork([str(word) for word in (*words, "--strength", 0.5, "--json")]) == 0
    done = json.loads(capsys.readouterr().out)
    expected = own(place / "run", Question(QUESTION, strength=0.5), place / "index")
    assert len(done["passages"]) == 3
    assert QUESTION in done["prompt"]
    trained = logits(load(place / "run").model)
    assert (expected - trained).abs().max() > 1e-2
    torch.testing.assert_close(logits(served(tmp_path / "a")), expected, atol=1e-5, rtol=0)


def test_passages_by_id_and_the_trained_adapter_give_the_same_logits_in_peft(place, tmp_path):
    both = {"load": load, "load_model": load_model, "run": str(place / "run")}
    done = export(**both, output=str(tmp_path / "ids"), ids=["p4", "p1"])
    assert done["passages"] == ["p4", "p1"]
    expected = own(place / "run", Question("any", ("p1", "p4")))
    torch.testing.assert_close(logits(served(tmp_path / "ids")), expected, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="Found an adapter in"):
        export(**both, output=str(tmp_path / "ids"))
    export(**both, output=str(tmp_path / "trained"))
    export(**both, output=str(tmp_path / "trained"), ids=["p2"], overwrite=True)
    assert "`p2`" in (tmp_path / "trained" / "README.md").read_text()
    export(**both, output=str(tmp_path / "trained"), overwrite=True)
    trained, dense = logits(load(place / "run").model), logits(load_model(shipped_model("decoder"))[0].float())
    assert (trained - dense).abs().max() > 1e-4
    torch.testing.assert_close(logits(served(tmp_path / "trained")), trained, atol=1e-5, rtol=0)


def test_servers_find_one_rank_short_names_and_every_layer(place, tmp_path):
    from safetensors.torch import load_file

    export(load, load_model, str(place / "run"), str(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 4, "none")
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    layers = load_model(shipped_model("decoder"))[0].config.num_hidden_layers
    assert {name.split(".")[4] for name in tensors} == {str(number) for number in range(layers)}
    assert not tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].any()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_decoders_of_other_types_give_the_same_logits_in_peft(kind, alpha, tmp_path):
    base = build(kind, "decoder")[0].float()
    ids = IDS % base.config.vocab_size
    base.save_pretrained(tmp_path / "base")
    converted = convert(Converted(base), ReGrad(rank=2, b_std=0.5, layers="1", lora_alpha=alpha))
    assert not torch.equal(logits(converted.model, ids), logits(load_model_of(tmp_path / "base"), ids))
    write_adapter(converted.model, converted.methods[0].config, tmp_path / "a", str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(load_model_of(tmp_path / "base"), tmp_path / "a").eval()
    torch.testing.assert_close(logits(wrapped, ids), logits(converted.model, ids), atol=1e-5, rtol=0)


def load_model_of(folder: Path) -> nn.Module:
    return load(folder).model


def test_modules_that_are_not_linear_are_refused_by_name(tmp_path):
    class Projection(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.weight, self.in_features, self.out_features = inner.weight, inner.in_features, inner.out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    base = tiny_model("llama", dtype=torch.float32)
    base.model.layers[1].mlp.up_proj = Projection(base.model.layers[1].mlp.up_proj)
    converted = convert(Converted(base), ReGrad(rank=2, layers="1"))
    assert "model.layers.1.mlp.up_proj" in adapters(converted.model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj \(Projection\); expected ordinary"):
        write_adapter(converted.model, converted.methods[0].config, tmp_path / "a", "base")
    assert not (tmp_path / "a").exists()


def test_names_that_other_kinds_of_modules_share_are_written_in_full(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.model.layers[0].mlp.up_proj = nn.Identity()
    path = "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(path)
    change = LowRankChange(torch.ones(1, linear.in_features), torch.ones(linear.out_features, 1))
    config = write_peft_folder(tmp_path / "a", model, {path: change}, scaling=1.0, base="base", readme="")
    assert config["target_modules"] == [path]


def test_a_base_model_with_other_weights_and_options_without_effect_are_refused(place, tmp_path):
    other = load(shipped_model("decoder"), dtype="float32").model
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    both = {"load": load, "load_model": load_model, "run": str(place / "run"), "output": str(tmp_path / "a")}
    with pytest.raises(ConfigError, match=r"Found other weights .*layers\.0\.mlp\.up_proj\.weight"):
        export(**both, base=str(tmp_path / "other"))
    for given, flag in (({"strength": 2.0}, "strength"), ({"ids": ["p1"], "passages": 2}, "passages")):
        with pytest.raises(ConfigError, match=f"Found --{flag}, which has no effect"):
            export(**both, **given)
    with pytest.raises(ConfigError, match="Found no index"):
        export(**both, question=QUESTION)
    with pytest.raises(ConfigError, match="Found files in"):
        export(load, load_model, str(place / "run"), str(tmp_path / "other"), overwrite=True)
    assert not (tmp_path / "a").exists()


def test_a_pretrained_model_that_is_an_adapter_itself_is_refused(place, tmp_path):
    export(load, load_model, str(place / "run"), str(tmp_path / "first"))
    convert(load(tmp_path / "first"), ReGrad(**SETTINGS)).save(tmp_path / "run")
    with pytest.raises(ConfigError, match="Found an adapter of PEFT as pretrained model"):
        export(load, load_model, str(tmp_path / "run"), str(tmp_path / "second"))


def test_an_adapter_beside_another_method_is_refused_for_the_dense_model(tmp_path):
    converted = convert(convert(load(shipped_model("decoder")), TopK(attention_k=2)), ReGrad(**SETTINGS))
    converted.save(tmp_path / "run")
    with pytest.raises(ConfigError, match="Found topk on the model beside regrad"):
        export(load, load_model, str(tmp_path / "run"), str(tmp_path / "a"))
