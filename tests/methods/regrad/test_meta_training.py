"""Meta-training through the common trainer: cases L1–L3 and L5 of the specification."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import regrad_toy
from graftwork.core.files import read_json, read_lines
from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.meta_training.episodes import Episodes
from graftwork.methods.regrad.modules import adapters, flat_adapter
from graftwork.methods.regrad.phases import SELECTION_FILE, STEP_SIZES_FILE, Meta
from graftwork.training.checkpoints import last_checkpoint
from regrad_toy import accuracy, examples, learn, toy_method, toy_model, toy_tokenizer


@pytest.mark.long
@pytest.mark.slow
def test_one_gradient_step_teaches_the_home_of_an_unseen_entity(tmp_path: Path):
    model, method = learn(tmp_path, steps=100)
    assert accuracy(model, method) >= 0.9
    assert accuracy(model, method, strength=0.0) <= 0.3
    assert accuracy(model, method, shift=1) <= 0.3
    logged = [row for row in read_lines(tmp_path / "train" / "log.jsonl") if "loss" in row]
    assert {"inner_loss", "gradient_norm", "update_ratio", "negative_step_sizes"} <= logged[-1].keys()
    sizes = read_json(tmp_path / "train" / STEP_SIZES_FILE)
    assert set(sizes) == {f"{path}.{name}" for path in adapters(model) for name in ("lora_A", "lora_B")}


@pytest.mark.long
def test_second_order_learns_more_than_first_order(tmp_path: Path):
    means = {}
    for order in (1, 2):
        found = []
        for seed in range(3):
            folder = tmp_path / f"{order}{seed}"
            found.append(accuracy(*learn(folder, steps=50, seed=seed, method=toy_method(folder, meta_order=order))))
        means[order] = sum(found) / len(found)
    assert means[2] - means[1] >= 0.1, means


@pytest.mark.long
@pytest.mark.slow
def test_sum_of_three_gradients_answers_better_than_wrong_passages(tmp_path: Path):
    model, method = learn(tmp_path, steps=100, passages=3)
    assert accuracy(model, method, passages=3, draws=4) >= 0.35
    assert accuracy(model, method, passages=3, draws=4, shift=1) <= 0.25


class Stop(TrainerCallback):
    """Stops like a signal: at the end of a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


class RecordingMeta(Meta):
    """Records the batches of its steps."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[list[int]] = []

    def step(self, model: Any, batch: Any) -> Any:
        self.seen.append(batch["document_ids"].flatten().tolist())
        return super().step(model, batch)


@pytest.mark.long
def test_resumed_run_equals_an_uninterrupted_run_bitwise(tmp_path: Path):
    kinds = {}
    for name in ("straight", "stopped"):
        folder = tmp_path / name
        method = toy_method(folder)
        recording = RecordingMeta(method.config)
        options: dict[str, Any] = {"steps": 40, "method": method, "save_steps": 40, "lr_scheduler_type": "linear"}
        if name == "stopped":
            learn(folder, callbacks=(Stop(20),), **options)
            assert last_checkpoint(folder / "train").name == "checkpoint-20"
        model, _ = learn(folder, phase=recording, **options)
        checkpoint = last_checkpoint(folder / "train")
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        kinds[name] = (model.state_dict(), state, recording.seen[-20:])
    (weights, optimizer, batches), (others, other_optimizer, other_batches) = kinds.values()
    assert batches == other_batches
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert optimizer.keys() == other_optimizer.keys()
    for number, entry in optimizer.items():
        assert all(torch.equal(entry[key], other_optimizer[number][key]) for key in entry)


def selection_file(folder: Path, answer: str | None = None) -> str:
    """Augmented questions on held-out entities; `answer` replaces the right answers."""
    rows = [
        {
            "test_id": number,
            "question": row.metadata["question"],
            "answer": answer or row.target,
            "passages": list(row.metadata["passages"]),
        }
        for number, row in enumerate(examples(range(150, 166), passages=1, seed=7))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dev.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("by", ["f1", "loss"])
def test_best_checkpoint_becomes_the_model(tmp_path: Path, by):
    settings = {"select": (selection_file(tmp_path),), "select_every": 2, "select_by": by}
    method = toy_method(tmp_path, **settings)
    kept: dict[int, torch.Tensor] = {}

    class SnapshotMeta(Meta):
        def after_update(self, updates: int) -> None:
            super().after_update(updates)
            kept[updates] = flat_adapter(self._run.model).detach().clone()

    model, _ = learn(tmp_path, steps=5, method=method, phase=SnapshotMeta(method.config), learning_rate=0.05)
    chosen = read_json(tmp_path / "train" / SELECTION_FILE)
    assert list(chosen["scores"]) == ["2", "4", "5"]
    assert chosen["scores"][str(chosen["best"])] == max(chosen["scores"].values())
    assert torch.equal(flat_adapter(model), kept[chosen["best"]])
    if by == "loss":
        assert max(chosen["scores"].values()) < 0


def test_run_with_scores_of_zero_keeps_a_model(tmp_path: Path):
    settings = {"select": (selection_file(tmp_path, "nowhere at all"),), "select_every": 1}
    model, _ = learn(tmp_path, steps=2, method=toy_method(tmp_path, **settings))
    assert set(read_json(tmp_path / "train" / SELECTION_FILE)["scores"].values()) == {0.0}
    assert last_checkpoint(tmp_path / "train") is not None
    assert torch.isfinite(flat_adapter(model)).all()


def test_resumed_selection_keeps_earlier_scores(tmp_path: Path):
    method = toy_method(tmp_path, select=(selection_file(tmp_path),), select_every=2, select_by="loss")
    learn(tmp_path / "run", steps=3, method=method, callbacks=(Stop(2),))
    learn(tmp_path / "run", steps=3, method=method)
    scores = read_json(tmp_path / "run" / "train" / SELECTION_FILE)["scores"]
    assert list(scores) == ["2", "3"]
    learn(tmp_path / "whole", steps=3, method=method)
    assert read_json(tmp_path / "whole" / "train" / SELECTION_FILE)["scores"] == scores


def test_only_the_adapter_is_trained_and_other_parameters_are_unfrozen_afterwards(tmp_path: Path):
    before = toy_model(0).state_dict()
    model, _ = learn(tmp_path, steps=2)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("training", "message"),
    [({"fp16": True}, "fp16 is on"), ({"mixture": "multihop/general"}, "list its tasks")],
)
def test_incompatible_training_settings_raise(tmp_path: Path, training, message):
    with pytest.raises(ConfigError, match=message):
        learn(tmp_path, steps=1, **training)


def test_dropout_with_checkpointing_is_refused(tmp_path: Path, monkeypatch):
    def dropping(seed: int) -> Any:
        model = build(seed)
        model.model.layers[1].mlp.act_fn = torch.nn.Sequential(model.model.layers[1].mlp.act_fn, torch.nn.Dropout(0.1))
        return model

    build = regrad_toy.toy_model
    monkeypatch.setattr(regrad_toy, "toy_model", dropping)
    with pytest.raises(ConfigError, match=r"act_fn\.1 has dropout 0\.1"):
        learn(tmp_path, steps=1, gradient_checkpointing=True)
    learn(tmp_path, steps=1)


def test_questions_without_passages_are_dropped_and_an_empty_dataset_raises(tmp_path: Path, caplog):
    method, rows = toy_method(tmp_path), examples(range(4), passages=1, seed=0)
    bare = [type(rows[0])(row.key, row.input, row.target, row.answers, {"passages": ("", " ")}) for row in rows[:3]]
    lengths = {"max_input_tokens": 64, "max_target_tokens": 4}
    assert len(Episodes([*bare, *rows], toy_tokenizer(), method.config, **lengths)) == 4
    assert "3 of 7 questions have no passage" in caplog.text
    with pytest.raises(DataError, match="no passage with any of 3 questions"):
        Episodes(bare, toy_tokenizer(), method.config, **lengths)


def test_prompt_contains_passages_only_if_blind_is_off(tmp_path: Path):
    row, tokenizer, method = examples([5, 6], passages=2, seed=0)[0], toy_tokenizer(), toy_method(tmp_path)
    lengths = {"max_input_tokens": 64, "max_target_tokens": 4}
    blind = Episodes([row], tokenizer, method.config, **lengths)[0]
    seeing = Episodes([row], tokenizer, dataclasses.replace(method.config, blind=False), **lengths)[0]
    assert [tokenizer.decode(ids) for ids in blind["documents"]] == [f"<s> {text}" for text in row.metadata["passages"]]
    assert blind["documents"] == seeing["documents"]
    asked = f"where does e5 live ? answer: {row.target} <nl>"
    assert tokenizer.decode(blind["input_ids"]) == f"<s> {asked}"
    answers = [label for label in blind["labels"] if label != -100]
    assert tokenizer.decode(answers) == f"{row.target} <nl>"
    shown = " ".join(row.metadata["passages"])
    assert tokenizer.decode(seeing["input_ids"]) == f"<s> {shown} {asked}"
    cut = Episodes(
        [row], tokenizer, dataclasses.replace(method.config, blind=False), **{**lengths, "max_input_tokens": 14}
    )
    assert tokenizer.decode(cut[0]["input_ids"]) == f"<s> {row.metadata['passages'][0]} {asked}"
