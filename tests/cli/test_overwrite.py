"""A training that starts anew begins where the first one began, and a run can be repeated from its own file."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from graftwork.demo import shipped_model

STEPS = ("--max-steps", "2", "--per-device-train-batch-size", "4", "--save-steps", "2")


@pytest.fixture
def train(graftwork, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"input": "who hired person {n}?", "target": "person {n + 1}"}}\n' for n in range(8)))

    def run(folder: Path, rate: str, *more: str):
        outcome = graftwork("train", folder, "--task", rows, *STEPS, "--learning-rate", rate, *more)
        assert outcome.code == 0, outcome.err
        return load_file(folder / "model" / "model.safetensors")

    return run


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def convert(graftwork, method: str, model, folder: Path, *more: str):
    outcome = graftwork("convert", method, model, "-o", folder, *more)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(("method", "settings"), [("topk", ["--feed-forward-k", "24"]), ("wt5", [])])
def test_overwriting_a_finished_training_starts_from_the_converted_model(graftwork, train, tmp_path, method, settings):
    for name in ("twice", "once"):
        convert(graftwork, method, shipped_model("encoder_decoder"), tmp_path / name, *settings)
    first = train(tmp_path / "twice", "1e-2")
    assert graftwork("train", tmp_path / "twice", "--task", tmp_path / "rows.jsonl", *STEPS).code == 2
    assert same(train(tmp_path / "twice", "1e-2", "--overwrite"), first)  # the same training is finished
    again = train(tmp_path / "twice", "1e-3", "--overwrite")
    assert not same(again, first)
    assert same(again, train(tmp_path / "once", "1e-3"))


@pytest.mark.long
def test_a_run_on_top_of_a_trained_run_is_repeated_and_started_anew(graftwork, train, tmp_path):
    convert(graftwork, "topk", shipped_model("encoder_decoder"), tmp_path / "topk", "--feed-forward-k", "24")
    train(tmp_path / "topk", "1e-2")
    convert(graftwork, "wt5", tmp_path / "topk", tmp_path / "both")
    expected = train(tmp_path / "both", "1e-3")
    outcome = graftwork("run", tmp_path / "both" / "run.yaml", "-o", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    assert same(load_file(tmp_path / "again" / "model" / "model.safetensors"), expected)
    train(tmp_path / "both", "5e-3", "--overwrite")
    assert same(train(tmp_path / "both", "1e-3", "--overwrite"), expected)


def test_a_second_conversion_is_refused_until_overwrite(graftwork, train, tmp_path):
    words = ("convert", "topk", shipped_model("encoder_decoder"), "-o", tmp_path / "run", "--feed-forward-k", "24")
    assert graftwork(*words).code == 0
    trained = train(tmp_path / "run", "1e-2")
    outcome = graftwork(*words)
    assert outcome.code == 2
    assert "already contains model, train" in outcome.err
    assert same(load_file(tmp_path / "run" / "model" / "model.safetensors"), trained)
    assert graftwork(*words, "--overwrite").code == 0
    assert not (tmp_path / "run" / "train").exists()
    assert same(train(tmp_path / "run", "1e-2"), trained)


def test_a_learning_rate_of_1e30_fails_and_writes_no_model(graftwork, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"input": "who hired person {n}?", "target": "person {n + 1}"}}\n' for n in range(8)))
    convert(graftwork, "topk", shipped_model("encoder_decoder"), tmp_path / "run", "--feed-forward-k", "24")
    before = load_file(tmp_path / "run" / "model" / "model.safetensors")
    steps = ("--max-steps", "3", "--per-device-train-batch-size", "4", "--learning-rate", "1e30")
    outcome = graftwork("train", tmp_path / "run", "--task", rows, *steps)
    assert outcome.code == 1
    assert "NonFiniteError" in outcome.err
    assert "at step 2" in outcome.err
    assert same(load_file(tmp_path / "run" / "model" / "model.safetensors"), before)
