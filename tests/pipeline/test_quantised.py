"""Methods and LoRA on quantised checkpoints: outputs, gradients, digests, round trips and the command line."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.cli.app import run
from graftwork.core.tensors import is_composite
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.grafting.identity import matches_digest, weights_digest
from graftwork.methods.regrad.encoding.fingerprint import fingerprint
from graftwork.methods.regrad.modules import adapters
from graftwork.pipeline.estimation.estimate import Estimator, Shape
from graftwork.pipeline.phases import with_lora, without_lora
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.quantised import is_quantised, quantised_modules

torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install graftwork[quantised]")
pytestmark = [
    # torchao registers types that torch 2.13 handles by itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
IDS = torch.tensor([[5, 9, 14, 22, 31, 8, 40, 12], [7, 7, 30, 11, 19, 26, 6, 13]])
METHODS = {"topk": lambda: gw.TopK(feed_forward_k=16), "regrad": lambda: gw.ReGrad(rank=2, b_std=0.02)}


def quantised_folder(path, quantisation):
    """Save the shipped decoder with quantised weights, in the format of transformers."""
    import transformers

    source = shipped_model("decoder")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantisation, dtype=torch.float32
    )
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(path)
    return path


def torchao_folder(path, bits):
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    # packed layouts of 4 bits have kernels for CUDA only
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = Int8WeightOnlyConfig() if bits == 8 else four
    return quantised_folder(path, transformers.TorchAoConfig(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return torchao_folder(tmp_path_factory.mktemp("int8"), 8)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    return torchao_folder(tmp_path_factory.mktemp("int4"), 4)


def plain_copy(model: nn.Module) -> nn.Module:
    """The same numbers in ordinary parameters, turned back by torchao itself."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_composite(parameter):
                setattr(module, name, nn.Parameter(parameter.dequantize()))
    return copied


@pytest.mark.parametrize(("name", "fixture"), [("topk", "folder"), ("regrad", "folder"), ("regrad", "four_bits")])
def test_a_method_computes_what_it_computes_on_the_same_numbers_unquantised(name, fixture, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    model, tokenizer = gw.load_model(str(folder))
    before = weights_digest(model)
    plain = gw.convert(plain_copy(model), METHODS[name]()).model
    converted = gw.convert(model, METHODS[name](), tokenizer=tokenizer)
    assert len(quantised_modules(converted.model)) == 28
    with torch.no_grad():
        output = converted.model(IDS).logits
        expected = plain(IDS).logits
    assert torch.allclose(output, expected, atol=2e-4 * float(expected.abs().max()))
    converted.model(IDS, labels=IDS).loss.backward()
    learned = {path for path, parameter in converted.model.named_parameters() if parameter.grad is not None}
    assert not any(is_quantised(dict(converted.model.named_parameters())[path]) for path in learned)
    if name == "regrad":
        assert {f"{path}.graftwork_adapter.lora_A" for path in adapters(converted.model)} <= learned
        same = gw.convert(gw.load_model(str(folder))[0], METHODS[name]())
        config = converted.methods[0].config
        assert fingerprint(converted.model, tokenizer, config) == fingerprint(same.model, tokenizer, config)
    converted.save(tmp_path / "run")
    again = gw.load(tmp_path / "run")
    assert torch.equal(again.model(IDS).logits, output)
    assert matches_digest(again.model, weights_digest(converted.model))
    gw.restore(again)
    assert weights_digest(again.model) == before


def test_digests_depend_on_the_integers_and_on_the_scales(folder):
    model, _ = gw.load_model(str(folder))
    before = weights_digest(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    for part in (weight.qdata, weight.scale):
        kept = part[0, 0].clone()
        part[0, 0] += 1
        assert not matches_digest(model, before)
        part[0, 0] = kept
    assert matches_digest(model, before)


def test_lora_is_merged_into_weights_that_are_turned_back(folder, tmp_path):
    model, _ = gw.load_model(str(folder))
    converted = gw.convert(model, gw.TopK(feed_forward_k=16))
    adapted = with_lora(converted.model, {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False})
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        merged = without_lora(adapted, converted.model)
        assert torch.allclose(merged(IDS).logits, expected, atol=2e-4 * float(expected.abs().max()))
    assert quantised_modules(merged) == []
    merged.save_pretrained(tmp_path)
    assert "base" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert torch.allclose(gw.load(tmp_path).model(IDS).logits, merged(IDS).logits)


def test_quantised_weights_are_not_trained(folder, tmp_path, offline_world):
    settings = TrainingSettings(tasks=("world/facts",), max_steps=1)
    converted = gw.convert(*gw.load_model(str(folder))[:1], gw.TopK(feed_forward_k=16))
    converted.save(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"Set train\.lora"):
        gw.train(tmp_path / "run", settings, data=offline_world / "unifiedqa")
    assert run(["convert", "topk", str(folder), "-o", str(tmp_path / "x"), "--feed-forward-k", "auto"]) != 0


def test_an_estimate_counts_the_bytes_of_quantised_weights(folder):
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    memory = Estimator(str(folder), Shape("cpu")).inference([], EvaluationSettings(max_input_tokens=32))[1]
    assert memory.weights == pytest.approx(stored, rel=0.1)
    training = Estimator(str(folder), Shape("cpu")).training(
        [gw.ReGrad(rank=2)], TrainingSettings(max_input_tokens=32, max_target_tokens=8)
    )[2]
    assert training is not None
    assert training.weights == pytest.approx(stored, rel=0.4)


@pytest.mark.long
@pytest.mark.parametrize("method", ["topk", "regrad"])
def test_the_command_line_runs_on_a_quantised_checkpoint(method, folder, tmp_path, offline_world, capsys):
    data, out = offline_world / "unifiedqa", str(tmp_path / "run")
    options, task = ["--feed-forward-k", "16"], "world/facts"
    if method == "regrad":
        options, task = ["--rank", "2", "--passages", "1"], "multihop/popqa"
        rows = [
            {"test_id": number, "question": "Where is it?", "answer": "Here", "passages": [f"It is here, at {number}."]}
            for number in range(8)
        ]
        data = tmp_path / "data"
        (data / "popqa").mkdir(parents=True)
        (data / "popqa" / "train.json").write_text(json.dumps(rows))
    lora = ["--set", "train.lora={r: 2, target_modules: [q_proj]}"] if method == "topk" else []
    assert run(["convert", method, str(folder), "-o", out, *options]) == 0
    before = gw.load(out).digest()
    train = ["train", out, "--task", task, "--data", str(data), "--max-steps", "2", "--learning-rate", "0.01", *lora]
    assert run(train) == 0, capsys.readouterr()
    trained = gw.load(out)
    assert trained.digest() != before
    assert bool(quantised_modules(trained.model)) == (method == "regrad")
    if method == "topk":
        assert run(["evaluate", out, "--task", task, "--data", str(data), "--limit", "4"]) == 0
    else:
        corpus = tmp_path / "corpus.tsv"
        corpus.write_text("id\ttext\ttitle\n1\tThe river is long.\tRiver\n")
        assert run(["bank", "build", out, str(corpus), "-o", str(tmp_path / "bank")]) == 0
    extra = ["--set", "method.strength=0"] if method == "regrad" else []
    assert run(["predict", out, "Where is it?", *extra]) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_bitsandbytes_of_4_bits(name, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    folder = quantised_folder(tmp_path / "nf4", config)
    model, _ = gw.load_model(str(folder))
    with torch.no_grad():
        dense = model(IDS).logits
    whole = gw.TopK(feed_forward_k=384) if name == "topk" else gw.ReGrad(rank=2, b_std=0.0)
    with torch.no_grad():
        # all units kept, and an adapter that adds nothing
        assert torch.allclose(gw.convert(model, whole).model(IDS).logits, dense, atol=1e-4)
    gw.restore(model)
    converted = gw.convert(model, METHODS[name]())
    converted.model(IDS, labels=IDS).loss.backward()
    learned = [parameter for parameter in converted.model.parameters() if parameter.grad is not None]
    assert learned
    assert not any(map(is_quantised, learned))
    with torch.no_grad():
        output = converted.model(IDS).logits
    if any(getattr(each.quant_state, "packing_format_for_cpu", False) for each in quantised_parameters(model)):
        with pytest.raises(ConfigError, match="rearranged them for this CPU"):
            converted.save(tmp_path / "run")
        return
    converted.save(tmp_path / "run")
    again = gw.load(tmp_path / "run")
    assert again.digest() == converted.digest()
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, output)


def quantised_parameters(model):
    return [parameter for parameter in model.parameters() if is_quantised(parameter)]
