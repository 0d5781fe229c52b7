"""The whole line on real files: raw data sets in, a page of results out."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from graftwork.cli.app import run

TRAINING = (
    "--max-steps",
    "10",
    "--save-steps",
    "2",
    "--per-device-train-batch-size",
    "4",
    "--max-input-tokens",
    "64",
    "--lr-scheduler-type",
    "constant",
    "--train-sampling-strategy",
    "group_by_length",
    "--seed",
    "3",
)
SIZE = ("--limit", "6", "--max-new-tokens", "4", "--max-input-tokens", "64")


@pytest.fixture(scope="module")
def workplace(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small T5 around the real tokenizer, both data sets prepared, and a converted run."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=16,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    AutoTokenizer.from_pretrained(shared / "models" / "t5-tokenizer").save_pretrained(folder / "t5")
    raw = str(shared / "data" / "unifiedqa")
    for split in ("train", "dev"):
        words = ["prepare", "unifiedqa/openbookqa", "unifiedqa/ropes", "-i", raw, "-o", str(folder / "data")]
        assert run([*words, "--split", split, "--format", "t5"]) == 0
    assert run(["convert", "topk", str(folder / "t5"), "-o", str(folder / "run"), "--feed-forward-k", "16"]) == 0
    return folder


def training(folder: Path, name: str) -> list[str]:
    return ["train", str(folder / name), "--task", str(folder / "data/combined_train_t5.jsonl"), *TRAINING]


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    assert run(training(workplace, "run")) == 0
    return workplace


@pytest.mark.long
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_weights(trained):
    killed = trained / "killed"
    assert run(["convert", "topk", str(trained / "t5"), "-o", str(killed), "--feed-forward-k", "16"]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "graftwork", *training(trained, "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (killed / "train/finetune/checkpoint-4/trainer_state.json").is_file():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert run(training(trained, "killed")) == 0
    expected = load_file(trained / "run/model/model.safetensors")
    resumed = load_file(killed / "model/model.safetensors")
    assert expected.keys() == resumed.keys()
    before = load_file(trained / "t5/model.safetensors")
    assert any(not torch.equal(before[name], expected[name]) for name in before)
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_trained_run_is_swept_reported_and_asked(graftwork, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "run", folder)
    dev = trained / "data/combined_dev_t5.jsonl"
    outcome = graftwork("evaluate", folder, "--task", dev, *SIZE, "--over", "method.feed_forward_k=null,64,4", "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)
    assert {row["task"] for row in rows} == {"unifiedqa/openbookqa_t5", "unifiedqa/ropes_t5"}
    assert {row["size"] for row in rows} == {6}
    answers = {
        setting: (folder / "predictions/unifiedqa" / f"openbookqa_t5.{setting}.jsonl").read_text()
        for setting in ("dense", "feed_forward_k=64")
    }
    # all 64 units kept is the dense layer
    assert answers["dense"] == answers["feed_forward_k=64"]
    assert graftwork("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert "unifiedqa/openbookqa_t5" in page
    assert "data:image/" in page or "<svg" in page
    questions = tmp_path / "questions.txt"
    questions.write_text("what is frozen water called? \\n (a) ice (b) steam\nwhere do fish live?\n")
    outcome = graftwork("predict", folder, "--input", questions, "--json")
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["id"] for line in outcome.out.splitlines()] == ["1", "2"]
