"""Import of the authors' checkpoints and configuration files: case L4 of the specification."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adapted_models import random_llama
from graftwork.cli.app import run
from graftwork.errors import CheckpointMismatchError, ConfigError, DataError
from graftwork.grafting.conversion import convert
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.fingerprint import fingerprint
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.importing import check_positions, load_original, original_names, read_original
from graftwork.methods.regrad.modules import adapters, flat_adapter, layout, step_sizes
from graftwork.methods.regrad.text.prompting import family_for, question_ids
from graftwork.pipeline.loading import load
from graftwork.settings.recipe import load_recipe
from tiny_models import forget_digests, word_tokenizer
from tokenizer_layouts import layout as layout_of_family

PEFT = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": [
        f"model.layers.{layer}.mlp.{part}_proj" for layer in (2, 3, 4) for part in ("gate", "up", "down")
    ],
}
LEARNER = {
    "base_model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
    "init_alpha": 0.01,
    "alpha_mode": "tie",
    "use_simple_prompt": False,
    "load_dtype": "auto",
}
TRAIN = {
    "meta_batch_size": 16,
    "meta_lr": 4e-4,
    "num_epochs": 1,
    "logging_steps": 100,
    "eval_steps": 1000,
    "do_eval": True,
    "save_best": True,
    "num_samples_for_eval": 300,
    "mixed_precision": "bf16",
    "lr_scheduler": "LinearLR",
    "max_context_len": 512,
    "train_with_only_related": False,
    "eval_with_only_related": False,
}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Run folder in the original's format, with random values."""
    folder = tmp_path / "original"
    folder.mkdir()
    files = {
        "peft_config": PEFT,
        "learner_config": LEARNER,
        "train_args": TRAIN,
        "generation_config": {"max_new_tokens": 20},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    torch.save(tensors(), folder / "meta_state_dict.pth")
    return folder


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for module in PEFT["target_modules"]:
        down = "down" in module
        for letter, shape in (("A", (4, 172 if down else 64)), ("B", (64 if down else 172, 4))):
            name = f"base_model.model.{module}.lora_{letter}.default.weight"
            stored[f"base_model.{name}"] = torch.randn(shape, generator=generator)
            stored["alpha_" + name.replace(".", "-")] = torch.randn((), generator=generator)
    return stored


def change(file: Path, **changes: Any) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_original_checkpoint_is_imported_bitwise(original):
    found = read_original(original)
    model = convert(random_llama(), ReGrad(found.method)).model
    load_original(model, original / "meta_state_dict.pth")
    stored, names = tensors(), original_names(model)
    parts, sizes = layout(model).split(flat_adapter(model)), layout(model).split(step_sizes(model))
    assert len(names) == 18
    for ours, theirs in names.items():
        assert torch.equal(parts[ours], stored[f"base_model.{theirs}"])
        assert (sizes[ours] == stored["alpha_" + theirs.replace(".", "-")]).all()


def test_configuration_files_become_settings(original):
    found = read_original(original)
    assert (found.model, found.dtype) == ("meta-llama/Llama-3.2-1B-Instruct", None)
    method = found.method
    assert (method.rank, method.scaling, method.layers, method.projections) == (4, 2.0, "2,3,4", ("gate", "up", "down"))
    assert (method.step_size_mode, method.initial_step_size, method.answer_end) == ("tie", 0.01, "newline")
    assert (method.select_every, method.select_samples, method.select_by, method.outer_loss) == (1000, 300, "f1", True)
    assert method.max_document_tokens == 512
    assert found.train["learning_rate"] == 4e-4
    assert found.train["gradient_accumulation_steps"] * found.train["per_device_train_batch_size"] == 16
    assert found.train["bf16"]
    assert found.evaluate == {"max_new_tokens": 20}
    change(original / "train_args.json", outer_loss=False, eval_only_loss=True, lr_scheduler="CosineAnnealingLR")
    change(original / "learner_config.json", alpha_mode="fix", use_simple_prompt=True, load_dtype="default")
    other = read_original(original)
    assert (other.method.outer_loss, other.method.select_by, other.method.prompt) == (False, "loss", "simple")
    assert (other.method.step_size_mode, other.dtype) == ("fix", "float32")
    assert other.train["lr_scheduler_type"] == "cosine"
    # the original's default in training, and its limit when it stores gradients
    change(original / "train_args.json", max_context_len=None)
    assert read_original(original).method.max_document_tokens == 1024
    (original / "train_args.json").unlink()
    assert read_original(original).method.max_document_tokens == 2048


def test_context_longer_than_the_model_is_refused(original):
    change(original / "train_args.json", max_context_len=513)
    method = read_original(original).method
    with pytest.raises(ConfigError, match="max_context_len is 513, and the model has 512 positions"):
        check_positions(random_llama(), method)
    check_positions(random_llama(), replace(method, max_document_tokens=512))


def test_words_of_the_authors_are_recorded_and_asked_token_for_token(original, tmp_path, capsys):
    """A prompt of the original's structure, as a file: start token twice, one line feed after a header, final space."""
    tokenizer = layout_of_family("llama3")
    words = {
        "system": "",
        "context": "",
        "passage": "Passage {{ number - 1 }}: {{ text }}",
        "user": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n{{ question }}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>",
        "assistant": "The answer is: ",
    }
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(words))
    random_llama(vocabulary=64).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    command = ["import", "regrad", str(original), "-o", str(tmp_path / "run"), "--model", str(tmp_path / "base")]
    assert run([*command, "--prompt", str(tmp_path / "words.yaml")]) == 0
    config = load(tmp_path / "run").methods[-1].config
    assert config.prompt == str(tmp_path / "words.yaml")
    expected = words["user"].replace("{{ question }}", "Who wrote it?") + "\nThe answer is: "
    ids = question_ids(tokenizer, family_for(config, "open"), "Who wrote it?")
    assert ids == tokenizer(expected)["input_ids"]
    assert ids[:2] == [tokenizer.bos_token_id] * 2
    # control tokens of a hostile question are text here too
    hostile = question_ids(tokenizer, family_for(config, "open"), "Who?<|eot_id|>")
    assert hostile.count(tokenizer.eos_token_id) == ids.count(tokenizer.eos_token_id)
    assert run([*command[:4], str(tmp_path / "other"), *command[5:], "--prompt", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("peft_config", {"target_modules": ["q_proj"]}, r"target_modules is .*q_proj.*Expected full names"),
        ("peft_config", {"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ("peft_config", {"lora_dropot": 0.1}, "Unknown key 'lora_dropot'"),
        ("learner_config", {"load_dtype": "int4"}, "load_dtype is 'int4'"),
        ("learner_config", {"alpha_mode": "many"}, "step_size_mode"),
        ("train_args", {"lr_scheduler": "StepLR"}, "lr_scheduler is 'StepLR'"),
        ("train_args", {"meta_learning_rate": 1.0}, "Unknown key 'meta_learning_rate'"),
    ],
)
def test_unsupported_settings_are_rejected(original, file, changes, message):
    change(original / f"{file}.json", **changes)
    with pytest.raises(ConfigError, match=message):
        read_original(original)


def test_unknown_keys_can_be_ignored_but_not_a_missing_architecture(original):
    change(original / "train_args.json", wandb=True)
    assert read_original(original, allow_unknown=True).train["learning_rate"] == 4e-4
    (original / "peft_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no peft_config.json.*defines the architecture"):
        read_original(original)


def test_missing_unexpected_and_misshapen_tensors_are_named(original):
    model, file = convert(random_llama(), ReGrad(read_original(original).method)).model, original / "x.pth"
    name = "base_model.base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight"
    before = flat_adapter(model).detach().clone()
    for stored, message in (
        ({key: value for key, value in tensors().items() if key != name}, f"no '{name}' .1 missing, 0 unexpected"),
        ({**tensors(), "lm_head.weight": torch.zeros(2)}, "an unknown 'lm_head.weight' .0 missing, 1 unexpected"),
        ({**tensors(), name: torch.zeros(172, 5)}, r"has shape \[172, 5\]; expected \[172, 4\]"),
    ):
        torch.save(stored, file)
        with pytest.raises(CheckpointMismatchError, match=message):
            load_original(model, file)
    assert torch.equal(flat_adapter(model), before)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_pickled_code_is_not_executed(original, capsys):
    torch.save({**tensors(), "evil": Evil()}, original / "meta_state_dict.pth")
    model = convert(random_llama(), ReGrad(read_original(original).method)).model
    with pytest.raises(DataError, match="not readable as tensors in plain containers"):
        load_original(model, original / "meta_state_dict.pth")
    assert capsys.readouterr().out == ""


def test_import_command_creates_a_loadable_run(original, tmp_path):
    random_llama(vocabulary=64).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    output = tmp_path / "run"
    assert run(["import", "regrad", str(original), "-o", str(output), "--model", str(tmp_path / "base")]) == 0
    loaded = load(output)
    assert loaded.methods[0].config == read_original(original).method
    expected = tensors()
    first = next(iter(adapters(loaded.model)))
    name = f"base_model.base_model.model.{first}.lora_A.default.weight"
    assert torch.equal(adapters(loaded.model)[first].lora_A, expected[name])
    recipe = load_recipe(output)
    assert recipe.method is not None
    assert (recipe.method["name"], recipe.method["rank"]) == ("regrad", 4)


def test_imported_gradients_match_the_imported_checkpoint(original, tmp_path):
    random_llama(vocabulary=64).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    imported, bank_folder = tmp_path / "run", tmp_path / "bank"
    assert run(["import", str(original), "-o", str(imported), "--model", str(tmp_path / "base")]) == 0
    loaded = load(imported)
    text = "w4 w9 w17 w30 w5"
    ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
    gradient, _ = passage_gradients(loaded.model, ids, torch.ones_like(ids))
    # the original's format: arbitrary tensor order, float32, named by question and rank
    parts, names = layout(loaded.model).split(gradient[0]), original_names(loaded.model)
    stored = {names[name]: parts[name].clone() for name in reversed(list(parts))}
    torch.save({"0_0": stored}, tmp_path / "dev.pt")
    questions = [{"test_id": 0, "question": "w4 ?", "answer": "w9", "passages": [text]}]
    (tmp_path / "dev.json").write_text(json.dumps(questions))
    words = ["bank", "import", str(tmp_path / "dev.pt"), "--questions", str(tmp_path / "dev.json")]
    assert run([*words, "--model", str(imported), "-o", str(bank_folder)]) == 0
    own = fingerprint(loaded.model, loaded.tokenizer, loaded.methods[0].config)
    with GradientBank(bank_folder, fingerprint=own) as bank:
        (name,) = bank.ids()
        assert torch.equal(bank.get([name])[0], gradient[0])


@pytest.mark.parametrize("change_of", ["missing", "extra"])
def test_graftwork_checkpoints_load_strictly(original, tmp_path, change_of):
    from safetensors.torch import load_file, save_file

    converted = convert(random_llama(vocabulary=64), ReGrad(rank=4), tokenizer=word_tokenizer())
    converted.save(tmp_path / "run")
    file = tmp_path / "run" / "model" / "model.safetensors"
    forget_digests(tmp_path / "run")
    stored = load_file(file)
    name = next(key for key in stored if key.endswith("lora_B"))
    if change_of == "missing":
        del stored[name]
    else:
        name = "model.layers.0.mlp.up_proj.graftwork_adapter.lora_B"
        stored[name] = torch.zeros(1)
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=name):
        load(tmp_path / "run")
