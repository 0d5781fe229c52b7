"""Training loop and model card shared by the three tiny models."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

Item = Mapping[str, list[int]]
IGNORED = -100
"""Label of tokens that the loss ignores."""


class Items(Dataset[Item]):
    """Tokenized examples."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        """Example with input ids and, unless the collator creates them, labels."""
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
    """Train a model reproducibly with `transformers.Trainer`.

    Args:
        model: Model to train in place.
        items: Training examples.
        collator: Data collator that pads a batch.
        steps: Number of optimizer steps.
        seed: Seed of the order of examples.
        batch_size: Examples per step.
        learning_rate: Peak of the cosine schedule, after a linear warm-up over the first 5 % of the steps.
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
        # the trainer prints its log to stdout, which is reserved for the card
        with contextlib.redirect_stdout(sys.stderr):
            cast(Any, trainer).train()
    model.eval()


def decode(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> list[str]:
    """Decode token ids [rows tokens] to one text per row, without special tokens."""
    return cast(Any, tokenizer).batch_decode(ids, skip_special_tokens=True)


def round_weights(model: PreTrainedModel) -> None:
    """Round the weights to bfloat16, so that the measured model equals the stored one."""
    cast(Module, model).bfloat16().float()


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
    """Write a model in bfloat16, its tokenizer, and a card with the command and scores of its training.

    Args:
        out: Output folder; created if missing, existing files are replaced.
        name: Name of the model on the command line.
        model: Model with weights already rounded to bfloat16.
        tokenizer: Tokenizer to write to the same folder.
        steps: Number of optimizer steps over all stages.
        seed: Seed of the world, the initial weights and the order of examples.
        seconds: Duration of the training.
        scores: Scores of the model.

    Returns:
        Contents of the card.
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
    model.bfloat16()
    cast(Any, model).save_pretrained(out)
    cast(Module, model).float()
    cast(Any, tokenizer).save_pretrained(out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card
