"""Model types of today through the whole line of commands: convert, train, evaluate, report, load."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import transformers

import graftwork as gw
import tiny_types
from graftwork.pipeline.loading import load
from tiny_models import word_tokenizer

DECODERS = ["qwen3", "gemma3_text", "phi3", "mixtral", "gpt_oss"]


def saved(model, folder: Path) -> Path:
    model.float().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"input": f"w{10 + i} w{11 + i}", "target": f"w{20 + i}"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def reviews(tmp_path):
    file = tmp_path / "reviews.csv"
    with file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["sentence", "label"])
        writer.writerows([f"w{10 + i} w{11 + i}", i % 2] for i in range(8))
    return file


def line(graftwork, model: Path, run: Path, task: Path, *settings: str) -> gw.Converted:
    """Run the commands and return the loaded model."""
    outcome = graftwork("convert", "topk", model, "-o", run, *settings)
    assert outcome.code == 0, outcome.err
    small = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--json")
    outcome = graftwork("train", run, "--task", task, *small)
    assert outcome.code == 0, outcome.err
    outcome = graftwork("evaluate", run, "--task", task, "--baseline", "--max-new-tokens", "3", "--json")
    assert outcome.code == 0, outcome.err
    assert [row["setting"] for row in json.loads(outcome.out)] == ["dense", "converted"]
    assert graftwork("report", run).code == 0
    assert (run / "report.html").exists()
    assert graftwork("doctor", run).code == 0
    return load(run, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_goes_through_the_whole_line(graftwork, tmp_path, questions, model_type):
    model, _ = tiny_types.build(model_type, "decoder")
    settings = ("--attention-k", "4", "--feed-forward-k", "12")
    loaded = line(graftwork, saved(model, tmp_path / "model"), tmp_path / "run", questions, *settings)
    assert loaded.model.config.model_type == model_type
    assert any("TopKAttention" in change.after for change in loaded.changes)
    assert any("Attention" not in change.path and "TopK" in change.after for change in loaded.changes)
    dense = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    trained = loaded.model.state_dict()
    assert any(not torch.equal(trained[name].float(), value.float()) for name, value in dense.items())


@pytest.mark.slow
def test_an_encoder_goes_through_the_whole_line(graftwork, tmp_path, reviews):
    labels = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    config = tiny_types.shrunk(transformers.ModernBertConfig, labels)
    model = transformers.ModernBertForSequenceClassification(config)
    settings = ("--attention-k", "4", "--feed-forward-k", "12")
    loaded = line(graftwork, saved(model, tmp_path / "model"), tmp_path / "run", reviews, *settings)
    assert loaded.model.config.model_type == "modernbert"
    assert len(loaded.changes) == 4
