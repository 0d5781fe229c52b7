"""Scores on the way: a part of the training examples is held out, and tells how far the training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.example import Examples
from graftwork.errors import ConfigError
from graftwork.tasks.sources import subset_order
from graftwork.training.phases import Phase

PREFIX = "eval_"
"""What the names of such scores begin with in the log, as the Trainer has it."""
_SALT = "validation"


@dataclass(frozen=True)
class HeldOut:
    """Encoded examples that are not trained on."""

    dataset: Any
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]]

    def batches(self, size: int, device: torch.device) -> list[dict[str, Any]]:
        """All of them, in order."""
        starts = range(0, len(self.dataset), size)
        found = [
            self.collate([self.dataset[index] for index in range(start, min(start + size, len(self.dataset)))])
            for start in starts
        ]
        return [{name: value.to(device) for name, value in batch.items()} for batch in found]


def hold_out(examples: Sequence[Examples], share: float, seed: int) -> tuple[list[Examples], list[Examples]]:
    """Part every task's examples in two by hash; what is held out of more examples holds what was held out of fewer.

    Args:
        examples: One entry for each task.
        share: How much is held out, between 0 and 1; at least one example of each task.
        seed: Draws another part.

    Returns:
        What to train on, and what to score on, in the order of the data.

    Raises:
        ConfigError: If nothing would be left to train on, or an entry is running text.
    """
    kept, held = [], []
    for part in examples:
        if part.running_text:
            raise ConfigError(
                f"Found validation with the running text {part.task}, which has no examples. Leave it out."
            )
        count = max(1, round(share * len(part.rows)))
        if count >= len(part.rows):
            raise ConfigError(
                f"Found {len(part.rows)} training examples of {part.task}, of which validation holds out {count}. "
                "Expected more than that; lower validation, or give more data."
            )
        order = subset_order([row.key for row in part.rows], split=_SALT, seed=seed)
        chosen = set(order[:count])
        for target, wanted in ((kept, False), (held, True)):
            rows = tuple(row for index, row in enumerate(part.rows) if (index in chosen) is wanted)
            target.append(replace(part, rows=rows, size=len(rows), ignored=0))
    return kept, held


@torch.no_grad()
def score(model: nn.Module, phase: Phase, held_out: HeldOut, size: int) -> dict[str, float]:
    """The phase's numbers over all that is held out, averaged over what batches have labels for.

    Every process scores all of it: they need not wait for each other, and agree on which weights are best.
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
