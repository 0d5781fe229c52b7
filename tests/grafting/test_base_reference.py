"""Runs that refer to the weights of their base: disk, equality, other loaders, changed and missing bases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import graftwork as gw
from graftwork.cli.app import run as run_command
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder
from graftwork.demo import shipped_model
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.methods.regrad.modules import flat_adapter
from graftwork.settings.recipe import read_run
from graftwork.settings.training import TrainingSettings
from regrad_toy import examples, toy_method, toy_model, toy_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Path(shutil.copytree(shipped_model("decoder"), tmp_path_factory.mktemp("base") / "decoder"))


@pytest.fixture
def own_base(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "own"))


def weights_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if not path.is_symlink())


def links(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink())


@pytest.mark.parametrize("method", [gw.TopK(attention_k=8), gw.ReGrad()], ids=["topk", "regrad"])
def test_run_with_links_equals_a_copy(base, tmp_path, method):
    converted = gw.convert(gw.load(base), method)
    copied = RunFolder(converted.save(tmp_path / "copied"))
    linked = RunFolder(converted.save(tmp_path / "linked", base_by_reference=True))
    original = (base / "model.safetensors").stat().st_size
    assert weights_on_disk(copied.model) - weights_on_disk(linked.model) == pytest.approx(original, rel=0.01)
    assert [path.resolve() for path in links(linked.path)] == [base / "model.safetensors"]
    loaded = gw.load(linked.path)
    assert loaded.digest() == converted.digest()
    opened = transformers.AutoModelForCausalLM.from_pretrained(linked.model)
    ids = torch.arange(5, 25)[None]
    expected = converted.model(input_ids=ids).logits
    for model in (loaded.model, opened):
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_copy_that_follows_links_is_complete(base, tmp_path):
    run = gw.convert(gw.load(base), gw.TopK(attention_k=8)).save(tmp_path / "run", base_by_reference=True)
    moved = shutil.copytree(run, tmp_path / "moved", symlinks=False)
    assert links(moved) == []
    assert gw.load(moved).digest() == gw.load(run).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "found no such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x55"), "have changed since: its SHA-256"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "have changed since: it has"),
    ],
    ids=["gone", "bit", "size"],
)
def test_missing_or_changed_base_is_named(own_base, tmp_path, change, message):
    run = gw.convert(gw.load(own_base), gw.TopK(attention_k=8)).save(tmp_path / "run", base_by_reference=True)
    change(own_base / "model.safetensors")
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        gw.load(run)
    assert str(own_base / "model.safetensors") in str(caught.value)


def test_model_with_other_weights_is_refused_and_nothing_is_written(base, tmp_path):
    converted = gw.convert(gw.load(base), gw.TopK(attention_k=8))
    with torch.no_grad():
        next(converted.model.parameters()).view(-1)[0] += 1
    with pytest.raises(ConfigError, match=r"has other values than in model\.safetensors.*without --base-by-reference"):
        converted.save(tmp_path / "run", base_by_reference=True)
    assert not (tmp_path / "run" / "model").exists()


def test_command_links_and_a_run_without_weights_to_link_is_refused(base, tmp_path, capsys):
    words = ["convert", "topk", str(base), "--attention-k", "8", "--base-by-reference"]
    assert run_command([*words, "-o", str(tmp_path / "run")]) == 0
    assert len(links(tmp_path / "run")) == 1
    assert run_command([*words, "-o", str(tmp_path / "other"), "--dtype", "float64"]) != 0
    assert "without --base-by-reference" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other" / "model").exists()


def test_other_type_is_refused(base, tmp_path):
    converted = gw.convert(gw.load(base, dtype="float64"), gw.TopK(attention_k=8))
    with pytest.raises(ConfigError, match="is float64 in the model"):
        converted.save(tmp_path / "run", base_by_reference=True)


def test_base_of_a_linked_run_is_the_file_itself(base, tmp_path):
    first = gw.convert(gw.load(base), gw.TopK(attention_k=8)).save(tmp_path / "first", base_by_reference=True)
    second = gw.load(first).save(tmp_path / "second", base_by_reference=True)
    shutil.rmtree(first)
    assert {path.resolve() for path in links(second)} == {base / "model.safetensors"}
    assert gw.load(second).methods[0].name == "topk"


@pytest.mark.long
def test_training_that_changes_the_base_writes_a_copy(base, tmp_path, caplog):
    run = RunFolder(gw.convert(gw.load(base), gw.TopK(attention_k=8)).save(tmp_path / "run", base_by_reference=True))
    (tmp_path / "rows.jsonl").write_text('{"input": "a b", "target": "c"}\n' * 8, encoding="utf-8")
    gw.train(run.path, TrainingSettings(tasks=(str(tmp_path / "rows.jsonl"),), max_steps=1, save_steps=1))
    assert read_run(run).base_by_reference
    assert links(run.path) == []
    assert "contains a copy of the weights" in caplog.text
    assert "base" not in json.loads((run.model / MANIFEST_FILE).read_text(encoding="utf-8"))


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "test_id": number,
            "question": row.metadata["question"],
            "answer": row.target,
            "passages": list(row.metadata["passages"]),
        }
        for number, row in enumerate(examples(range(32), passages=2, seed=3))
    ]
    (tmp_path / "data" / "popqa").mkdir(parents=True)
    (tmp_path / "data" / "popqa" / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.long
def test_checkpoints_of_a_frozen_base_hold_links_and_a_resumed_training_is_that_of_a_copy(tmp_path, questions):
    toy = tmp_path / "toy"
    toy_model(0).save_pretrained(toy)
    toy_tokenizer().save_pretrained(toy)
    settings = TrainingSettings(
        tasks=("multihop/popqa",),
        max_steps=2,
        save_steps=1,
        save_total_limit=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
    )
    method = toy_method(tmp_path)
    runs = {}
    for name in ("copied", "linked"):
        converted = gw.convert(gw.load(toy), method)
        runs[name] = RunFolder(converted.save(tmp_path / name, base_by_reference=name == "linked"))
        start = flat_adapter(gw.load(runs[name].path).model)
        if name == "linked":
            gw.train(runs[name].path, replace(settings, max_steps=1), data=questions)
        gw.train(runs[name].path, settings, data=questions)
    trained = [flat_adapter(gw.load(run.path).model) for run in runs.values()]
    assert (trained[0] - start).abs().max() > 1e-3
    assert torch.equal(*trained)
    checkpoints = sorted(runs["linked"].path.glob("train/*/checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    for folder in (*checkpoints, runs["linked"].model):
        assert [path.resolve() for path in links(folder)] == [toy / "model.safetensors"]
        assert weights_on_disk(folder) < (toy / "model.safetensors").stat().st_size
    methods = gw.load(runs["linked"].path).methods
    assert torch.equal(flat_adapter(gw.load(checkpoints[-1], methods=methods).model), trained[0])
