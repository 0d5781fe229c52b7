"""Validation during training: held-out examples and the metrics on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftwork.core.example import Examples
from graftwork.core.stored_rows import keys_of, select_rows
from graftwork.errors import ConfigError
from graftwork.tasks.sources import subset_order
from graftwork.training.batching import Collator, EncodedDataset
from graftwork.training.phases import Phase

PREFIX = "eval_"
"""Prefix of validation metrics in the log, as in the Trainer."""
_SALT = "validation"


@dataclass(frozen=True)
class HeldOut:
    """Encoded validation examples with their collator."""

    dataset: EncodedDataset
    collate: Collator

    def batches(self, size: int, device: torch.device) -> list[dict[str, Any]]:
        """Return all examples in order, in batches on the device.

        Args:
            size: Number of examples per batch.
            device: Device of the model.
        """
        starts = range(0, len(self.dataset), size)
        found = [
            self.collate([self.dataset[index] for index in range(start, min(start + size, len(self.dataset)))])
            for start in starts
        ]
        return [{name: value.to(device) for name, value in batch.items()} for batch in found]


def hold_out(examples: Sequence[Examples], share: float, seed: int) -> tuple[list[Examples], list[Examples]]:
    """Split the examples of every task by hash into training and validation examples.

    Validation sets of different shares are nested.

    Args:
        examples: One entry per task.
        share: Share of validation examples, between 0 and 1; at least one example of each task.
        seed: Seed of the split.

    Returns:
        Training examples and validation examples, in the order of the data.

    Raises:
        ConfigError: If no training example would remain, or an entry is running text.
    """
    kept: list[Examples] = []
    held: list[Examples] = []
    for part in examples:
        if part.running_text:
            raise ConfigError(
                f"Found validation with the running text {part.task}, which has no separate examples. Omit validation."
            )
        count = max(1, round(share * len(part.rows)))
        if count >= len(part.rows):
            raise ConfigError(
                f"Found {len(part.rows)} training examples of {part.task}, of which validation holds out {count}. "
                "Expected more than that; lower validation, or give more data."
            )
        order = subset_order(keys_of(part.rows), split=_SALT, seed=seed)
        chosen = set(order[:count])
        for target, wanted in ((kept, False), (held, True)):
            rows = select_rows(part.rows, [i for i in range(len(part.rows)) if (i in chosen) is wanted])
            target.append(replace(part, rows=rows, size=len(rows), ignored=0))
    return kept, held


@torch.no_grad()
def score(model: nn.Module, phase: Phase, held_out: HeldOut, size: int) -> dict[str, float]:
    """Compute a phase's metrics on the validation data, averaged with the number of labels of each batch as weight.

        metric = Σ_b n_b · metric_b / Σ_b n_b

    with n_b the number of labels of batch b, or its number of rows without labels. Every process scores all examples,
    so that no synchronisation is needed and all processes agree on the best checkpoint.

    Args:
        model: Model, in evaluation mode during scoring.
        phase: Phase that defines the metrics.
        held_out: Validation data.
        size: Number of examples per batch.
    """
    training = model.training
    model.eval()
    totals: dict[str, float] = {}
    weights = 0
    for batch in held_out.batches(size, next(model.parameters()).device):
        weight = int((batch["labels"] >= 0).sum()) if "labels" in batch else len(batch["input_ids"])
        for name, value in phase.validate(model, batch).items():
            totals[name] = totals.get(name, 0.0) + weight * float(value)
        weights += weight
    model.train(training)
    return {f"{PREFIX}{name}": total / max(weights, 1) for name, total in totals.items()}
