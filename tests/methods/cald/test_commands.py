"""Complete runs on the command line, and training in two processes."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from graftwork.cli.app import run
from methods.cald.runs import model
from tiny_models import word_tokenizer


def write_table(path, rows, seed):
    generator = random.Random(seed)
    lines = ["sentence1,label"]
    for _ in range(rows):
        words = [generator.randint(4, 63) for _ in range(generator.randint(4, 9))]
        lines.append(f"{' '.join(f'w{word}' for word in words)},{'high' if words[0] >= 34 else 'low'}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a pretrained encoder without a head, and two tables."""
    folder = tmp_path_factory.mktemp("commands")
    model().bert.save_pretrained(folder / "encoder")
    word_tokenizer().save_pretrained(folder / "encoder")
    write_table(folder / "train.csv", 32, 0)
    write_table(folder / "dev.csv", 16, 1)
    return folder


def graftwork(capsys, *words):
    code = run([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


TRAIN = (
    "--max-steps",
    8,
    "--per-device-train-batch-size",
    4,
    "--learning-rate",
    "1e-2",
    "--save-steps",
    2,
    "--save-total-limit",
    "null",
    "--max-grad-norm",
    "null",
    "--logging-steps",
    1,
)


@pytest.mark.long
def test_every_guide_runs_on_tables_and_reports_classes(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    guides = {
        "dense": [],
        "unguided": [],
        "target": ["--teacher", "dense"],
        "trajectory": ["--teacher-update-cycle", 2, "--teacher-learning-rate", "1e-2"],
        "waypoint": ["--snapshots", "dense/train/distill/checkpoint-*"],
        "hybrid": ["--teacher", "dense", "--distill-steps", 4],
    }
    for guide, options in guides.items():
        code, _, err = graftwork(
            capsys,
            "convert",
            "cald",
            "encoder",
            "-o",
            guide,
            "--task",
            "train.csv",
            "--rank",
            4,
            "--guide",
            guide,
            *options,
        )
        assert code == 0, err
        code, _, err = graftwork(capsys, "train", guide, "--task", "train.csv", *TRAIN)
        assert code == 0, err
    code, out, err = graftwork(capsys, "evaluate", "target", "--task", "dev.csv", "--baseline", "--json")
    assert code == 0, err
    rows = json.loads(out)
    assert {row["setting"] for row in rows} == {"converted", "dense"}
    assert all(0 <= row["accuracy"] <= 100 and row["size"] == 16 for row in rows)
    measured = json.loads((place / "target" / "results.json").read_text())["measures"]["converted"]
    assert {"distance", "distance/0", "distance/1", "distance/2"} <= set(measured)
    code, out, _ = graftwork(capsys, "evaluate", "waypoint", "--task", "dev.csv", "--checkpoints", "all", "--json")
    assert code == 0
    assert [row["setting"] for row in json.loads(out)] == ["step 2", "step 4", "step 6", "step 8"]
    answers = [json.loads(line) for line in (place / "target/predictions/dev.converted.jsonl").read_text().splitlines()]
    assert {answer["prediction"] for answer in answers} <= {"low", "high"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--share", "foo"], "share"),
        (["--guide", "target"], "teacher is null"),
        (["--guide", "unguided", "--layer-weight", "1"], "which has no teacher"),
        (["--guide", "hybrid", "--teacher", "x"], "distill_steps is null"),
        (["--guide", "trajectory", "--teacher-update-cycle", "0"], "teacher_update_cycle is 0"),
        (["--distill-steps", "-1", "--guide", "trajectory"], "omit it"),
    ],
)
def test_invalid_settings_exit_with_2_and_one_line(options, words, place, capsys, tmp_path):
    """See `place` for the encoder."""
    code, _, err = graftwork(capsys, "convert", "cald", place / "encoder", "-o", tmp_path / "run", *options)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_training_an_encoder_without_a_head_is_refused(place, capsys, tmp_path):
    assert graftwork(capsys, "convert", "cald", place / "encoder", "-o", tmp_path / "run", "--rank", 4)[0] == 0
    code, _, err = graftwork(capsys, "train", tmp_path / "run", "--task", place / "train.csv", "--max-steps", 1)
    assert code == 2
    assert "gives it a classification head" in err


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_accumulation(place, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # the launcher's --cpu starts one process; --multi_gpu starts several, with the gloo backend without a GPU
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = ["accelerate.commands.launch", *options.split(), "--main_process_port", "0", "-m", "graftwork"]
    weights = {}
    for name, words, accumulation in (("one", ["graftwork"], 2), ("two", launch, 1)):
        convert = ["convert", "cald", place / "encoder", "-o", tmp_path / name, "--task", place / "train.csv"]
        convert += ["--rank", 4, "--guide", "trajectory", "--save-teacher"]
        assert run([str(word) for word in convert]) == 0
        train = ["train", tmp_path / name, "--task", place / "train.csv", *TRAIN, "--max-steps", 4]
        train += ["--gradient-accumulation-steps", accumulation, "--optim", "sgd"]
        outcome = subprocess.run(
            [sys.executable, "-m", *words, *map(str, train)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        weights[name] = (
            load_file(tmp_path / name / "model/model.safetensors"),
            load_file(tmp_path / name / "train/distill/teacher/model.safetensors"),
        )
    for one, two in zip(*weights.values(), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
