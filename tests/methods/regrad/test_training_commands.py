"""Meta-training from the command line, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graftwork.cli.app import run
from graftwork.core.config import to_plain
from graftwork.core.files import read_json, write_record
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.modules import flat_adapter, step_sizes
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import run_recipe
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import Published, RunConfig
from graftwork.settings.training import TrainingSettings
from regrad_toy import examples, toy_method, toy_model, toy_tokenizer

STEPS = 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Augmented toy questions under the name of a registered data set."""
    rows = [
        {
            "test_id": number,
            "question": row.metadata["question"],
            "answer": row.target,
            "passages": list(row.metadata["passages"]),
        }
        for number, row in enumerate(examples(range(48), passages=2, seed=3))
    ]
    (tmp_path / "data" / "popqa").mkdir(parents=True)
    (tmp_path / "data" / "popqa" / "train.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def converted(folder: Path, **settings: object) -> Path:
    save(convert(toy_model(0), toy_method(folder, **settings), tokenizer=toy_tokenizer()), folder)
    (folder / "run.yaml").write_text(f"model: {folder / 'model'}\n")
    return folder


def words(folder: Path, data: Path, batch: int) -> list[str]:
    flags = {
        "task": "multihop/popqa",
        "data": data,
        "max-steps": STEPS,
        "learning-rate": "1e-2",
        "per-device-train-batch-size": batch,
        "max-grad-norm": "0.5",
    }
    return ["train", str(folder), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.mark.long
def test_two_processes_train_the_same_weights_as_one(tmp_path: Path, data: Path):
    # one graph in one process, and three passages at a time in two
    alone, shared = converted(tmp_path / "alone", meta_chunk="all"), converted(tmp_path / "shared", meta_chunk=3)
    assert run(words(alone, data, 8)) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "graftwork",
        *words(shared, data, 4),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert outcome.returncode == 0, outcome.stderr[:2000]
    expected, found = load(alone).model, load(shared).model
    start = flat_adapter(load(converted(tmp_path / "fresh")).model)
    assert (flat_adapter(expected) - start).abs().max() > 1e-2
    torch.testing.assert_close(flat_adapter(found), flat_adapter(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step_sizes(found), step_sizes(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"outer_loss": False},
        {"outer_loss": False, "plain_loss": "text_and_answers"},
        {"blind": False},
        {"meta_order": 1, "meta_chunk": 3},
    ],
)
def test_every_variant_trains_from_the_command_line(tmp_path: Path, data: Path, settings):
    folder = converted(tmp_path / "run", **settings)
    before = flat_adapter(load(folder).model)
    assert run(words(folder, data, 8)) == 0
    assert not torch.equal(flat_adapter(load(folder).model), before)
    assert (folder / "train" / "meta" / "step_sizes.json").exists()


def test_training_of_an_earlier_version_is_the_one_with_defaults(tmp_path: Path, data: Path, capsys):
    folder = converted(tmp_path / "run", meta_chunk=2)
    assert run(words(folder, data, 8)) == 0
    file = folder / "train" / "meta" / "settings.json"
    recorded = read_json(file)

    def record(**changed: object) -> None:
        (entry,) = recorded["methods"]
        kept = {name: value for name, value in {**entry, **changed}.items() if value is not None}
        write_record(file, {**recorded, "methods": [kept]})

    # a run without the setting has its default, which is another number of passages
    record(meta_chunk=None, strength=None)
    assert run(words(folder, data, 8)) == 2
    assert "another methods" in capsys.readouterr().err
    record(strength=None)
    assert run(words(folder, data, 8)) == 0


def test_recipe_trains_selects_fills_a_bank_and_answers(tmp_path: Path, data: Path):
    questions = data / "popqa" / "train.json"
    (data / "popqa" / "dev.json").write_text(json.dumps(json.loads(questions.read_text())[:6]))
    toy_model(0).save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    config = toy_method(
        tmp_path,
        bank=str(tmp_path / "bank"),
        on_missing="encode",
        passages=2,
        select=(str(questions),),
        select_samples=4,
    ).config
    recipe = RunConfig(
        model=str(tmp_path / "model"),
        method={"name": "regrad", **to_plain(config)},
        data=str(data),
        train=TrainingSettings(tasks=("multihop/popqa",), max_steps=2, max_input_tokens=64, max_target_tokens=4),
        evaluate=EvaluationSettings(tasks=("multihop/popqa",), max_new_tokens=3),
        published=(Published("multihop/popqa", "f1", 50.0, 1.0, "nobody"),),
    )
    results = run_recipe(recipe, tmp_path / "run")
    assert results.scores("multihop/popqa", "converted").keys() == {"exact_match", "f1", "precision", "recall"}
    assert (tmp_path / "run" / "train" / "meta" / "selection.json").exists()
    with GradientBank(tmp_path / "bank") as bank:
        # two passages for each of six questions; equal texts are stored once
        assert len(bank) == len({text for row in json.loads(questions.read_text())[:6] for text in row["passages"]})
    again = run_recipe(recipe, tmp_path / "run")
    assert again.scores("multihop/popqa", "converted") == results.scores("multihop/popqa", "converted")
