"""What pretraining the three tiny models has in common: the loop, and the card that a shipped folder carries."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

Item = Mapping[str, list[int]]
IGNORED = -100
"""Label of a token that the loss leaves out."""


class Items(Dataset[Item]):
    """Examples as token ids, made once."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        """One example: input ids and, unless the collator makes them, labels."""
        return self._items[index]


def train_model(
    model: PreTrainedModel,
    items: Sequence[Item],
    collator: Any,
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
) -> None:
    """Train a model with the library's own trainer, reproducibly.

    Args:
        model: Changed in place.
        items: What is learned, in random order.
        collator: Pads a batch.
        steps: Optimizer steps.
        seed: Order of the examples.
        batch_size: Examples per step.
        learning_rate: Highest rate; it rises over the first 5 % of the steps and falls to zero on a cosine.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=max(1, steps // 50),
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Items(items), data_collator=collator)
        # the trainer prints its log, and stdout is for the card
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    model.eval()


def round_weights(model: PreTrainedModel) -> None:
    """Round to bfloat16 what is stored in it, so that what is measured is what is shipped."""
    model.bfloat16().float()


def ship(
    out: Path,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    seconds: float,
    scores: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Write a model in bfloat16, its tokenizer, and the card that tells how it was made.

    Args:
        out: The folder; made if missing, files of the same names are replaced.
        name: Word of the command line.
        model: Already rounded.
        tokenizer: Goes into the same folder.
        steps: Optimizer steps, all stages together.
        seed: World, weights and order of training.
        seconds: What the training took.
        scores: What the model reaches.

    Returns:
        What the card says.
    """
    card = {
        "command": f"python -m graftwork.demo.pretraining.pretrain {name} -o DIR --steps {steps} --seed {seed} "
        f"--threads {torch.get_num_threads()}",
        "seconds": round(seconds),
        "steps": steps,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        **scores,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    model.bfloat16().save_pretrained(out)
    model.float()
    tokenizer.save_pretrained(out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card
