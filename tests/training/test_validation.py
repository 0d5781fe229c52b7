"""Validation data, validation metrics, and the checkpoint that is restored at the end."""

import logging

import pytest
import torch

from graftwork.core.example import Example, Examples
from graftwork.core.files import read_json, read_lines
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError
from graftwork.pipeline.loading import load
from graftwork.pipeline.training import train_phases
from graftwork.settings.training import TrainingSettings
from graftwork.training.trainer import PhaseTrainer
from graftwork.training.validation import hold_out
from methods.cald.runs import assert_close, during_batch, examples, start, terminate, train, values
from tiny_models import word_tokenizer

SCORED = {"validation": 0.25, "eval_steps": 2, "save_steps": 2}


def scores(folder):
    rows = read_lines(folder / "train" / "distill" / "log.jsonl")
    return [row for row in rows if "eval_loss" in row]


def keys(part):
    return {row.key for row in part.rows}


def test_held_out_examples_are_drawn_by_hash_and_nested():
    rows = tuple(Example(str(number), "text", "a") for number in range(40))
    whole = [Examples("t", "train", rows, 40, 0, "here")]
    (kept,), (held,) = hold_out(whole, 0.25, 0)
    assert len(held.rows) == 10 == held.size
    assert sorted(map(id, kept.rows + held.rows)) == sorted(map(id, rows))
    assert [int(row.key) for row in kept.rows] == sorted(int(row.key) for row in kept.rows)
    (_,), (more,) = hold_out(whole, 0.5, 0)
    assert keys(held) < keys(more)
    (_,), (other,) = hold_out(whole, 0.25, 1)
    assert keys(other) != keys(held)
    with pytest.raises(ConfigError, match="Found 1 training examples of t, of which validation holds out 1"):
        hold_out([Examples("t", "train", rows[:1], 1, 0, "here")], 0.5, 0)
    with pytest.raises(ConfigError, match="running text"):
        hold_out([Examples("t", "train", rows, 40, 0, "here", running_text=True)], 0.5, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_steps": 2}, "validation is null"),
        ({"load_best_model_at_end": True}, "validation is null"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": 0.1, "eval_steps": 2, "save_steps": 3, "load_best_model_at_end": True}, "every score needs"),
    ],
)
def test_invalid_validation_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        TrainingSettings(tasks=("words",), **settings)


def test_validation_scores_match_the_checkpoint_of_each_step(tmp_path):
    converted = start()
    train(converted, tmp_path, values(max_steps=5, save_total_limit=None, **SCORED))
    found = scores(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 5]
    (kept,), (held,) = hold_out([examples()], 0.25, 3)
    assert read_json(tmp_path / "train/distill/settings.json")["examples"] == len(kept.rows)
    label2id, tokenizer = converted.model.config.label2id, word_tokenizer()
    for row in found:
        student = load(tmp_path / f"train/distill/checkpoint-{row['step']}", methods=converted.methods).model
        losses, right = [], 0
        for example in held.rows:
            ids = torch.tensor([tokenizer(example.input)["input_ids"]])
            with torch.no_grad():
                logits = student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            target = torch.tensor([label2id[example.target]])
            losses.append(float(torch.nn.functional.cross_entropy(logits, target)))
            right += int(logits.argmax(-1) == target)
        assert row["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert row["eval_accuracy"] == pytest.approx(100 * right / len(losses))


@pytest.mark.parametrize("guide", ["unguided", pytest.param("trajectory", marks=pytest.mark.long)])
def test_an_interrupted_run_has_equal_scores_and_weights(guide, tmp_path):
    settings = values(max_steps=6, load_best_model_at_end=True, save_total_limit=2, **SCORED)
    expected = train(start(dropout=0.1, guide=guide), tmp_path / "straight", settings)
    with during_batch(4, terminate), pytest.raises(KeyboardInterrupt):
        train(start(dropout=0.1, guide=guide), tmp_path / "stopped", settings)
    found = train(start(dropout=0.1, guide=guide), tmp_path / "stopped", settings)
    assert_close(found, expected)
    assert scores(tmp_path / "stopped") == scores(tmp_path / "straight")
    assert ("eval_distance" in scores(tmp_path / "straight")[0]) is (guide == "trajectory")


def test_the_first_of_equally_good_checkpoints_is_restored(tmp_path, monkeypatch):
    accuracies = iter([40.0, 60.0, 60.0, 50.0])
    real = PhaseTrainer.evaluate

    def fixed(self, *args, **kwargs):
        return {**real(self, *args, **kwargs), "eval_accuracy": next(accuracies)}

    monkeypatch.setattr(PhaseTrainer, "evaluate", fixed)
    settings = values(
        max_steps=8, load_best_model_at_end=True, save_total_limit=2, gradient_accumulation_steps=2, **SCORED
    )
    converted = start()
    trained, closing = train_phases(converted, settings, [examples()], RunFolder(tmp_path), seed=3, overwrite=False)
    folder = tmp_path / "train" / "distill"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert closing["distill"]["best_step"] == 4
    assert closing["distill"]["best_score"] == 60
    assert_close(trained.model, load(folder / "checkpoint-4", methods=converted.methods).model, 0)


def test_checkpoints_are_written_only_at_the_configured_updates(tmp_path):
    settings = values(max_steps=6, save_steps=2, gradient_accumulation_steps=2)
    for name, limit, expected in (("all", None, {2, 4, 6}), ("two", 2, {4, 6})):
        train(start(), tmp_path / name, TrainingSettings(**{**vars(settings), "save_total_limit": limit}))
        found = (tmp_path / name / "train" / "distill").glob("checkpoint-*")
        assert {int(path.name.removeprefix("checkpoint-")) for path in found} == expected


def test_training_16_bit_weights_logs_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        train(start(), tmp_path / "full", values(max_steps=1))
        assert "small updates are lost" not in caplog.text
        half = start()
        half.model.to(torch.bfloat16)
        train(half, tmp_path / "half", values(max_steps=1))
    assert "The weights are in bfloat16, in which small updates are lost" in caplog.text
