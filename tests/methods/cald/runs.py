"""Small guided runs, shared by the tests of training."""

from __future__ import annotations

import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from graftwork.core.example import Example, Examples
from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, write_model
from graftwork.methods.cald import Cald
from graftwork.pipeline.training import train_phases
from graftwork.settings.training import TrainingSettings
from graftwork.training.trainer import PhaseTrainer
from tiny_models import word_tokenizer

ROWS = 20
LABELS = ("low", "high")


def examples(rows: int = ROWS, lengths: tuple[int, int] = (4, 9)) -> Examples:
    """Random words; the class depends on the number of the first word."""
    generator = random.Random(0)
    made = []
    for number in range(rows):
        words = [generator.randint(4, 63) for _ in range(generator.randint(*lengths))]
        label = LABELS[words[0] >= 34]
        made.append(Example(str(number), " ".join(f"w{word}" for word in words), label, (label,)))
    return Examples("words", "train", tuple(made), rows, 0, "here")


def model(dropout: float = 0.0, seed: int = 0) -> Any:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        pad_token_id=0,
        initializer_range=0.3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config).eval()


def start(dropout: float = 0.0, seed: int = 0, **settings: Any) -> Converted:
    return convert(model(dropout, seed), Cald(**{"rank": 4, **settings}), tokenizer=word_tokenizer())


def values(**changes: Any) -> TrainingSettings:
    base = {
        "tasks": ("words",),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "max_grad_norm": None,
    }
    return TrainingSettings(**{**base, **changes})


def train(converted: Converted, folder: Path, settings: TrainingSettings, rows: Examples | None = None) -> Any:
    trained, _ = train_phases(converted, settings, [rows or examples()], RunFolder(folder), seed=3, overwrite=False)
    return trained.model


def dense_run(folder: Path, steps: int = 10, **changes: Any) -> Any:
    """Dense fine-tuning with snapshots, saved as a run, for the guides target, hybrid and waypoint."""
    settings = values(max_steps=steps, save_steps=2, save_total_limit=None, **changes)
    converted = start(guide="dense")
    trained = train(converted, folder, settings)
    write_model(converted, RunFolder(folder))
    return trained


def log(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(folder / "train" / "distill" / "log.jsonl") if "loss" in row]


def state(found: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in found.state_dict().items()}


def assert_close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    one, other = (each if isinstance(each, dict) else each.state_dict() for each in (found, expected))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@contextmanager
def during_batch(number: int, action: Any):
    """Call `action` before training batch `number`, counted from 0."""
    seen = iter(range(number))
    step = PhaseTrainer.training_step

    def counted(self, *args, **options):
        if next(seen, None) is None:
            action()
        return step(self, *args, **options)

    PhaseTrainer.training_step = counted
    try:
        yield
    finally:
        PhaseTrainer.training_step = step


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class KilledError(Exception):
    """Simulated end of the process."""


def kill() -> None:
    raise KilledError
