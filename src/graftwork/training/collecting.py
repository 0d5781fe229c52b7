"""Phases without an optimiser: one pass over the data that collects something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.progress import Progress
from graftwork.settings.training import TrainingSettings
from graftwork.training.phases import Phase


@torch.no_grad()
def collect_phase(
    model: nn.Module,
    phase: Phase,
    dataset: Any,
    folder: Path,
    settings: TrainingSettings,
    *,
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]],
) -> dict[str, float]:
    """Call a phase's step on every batch in order, then its `finish`.

    A pass that was stopped begins anew; what it collects is written at the end only.

    Args:
        model: Converted model, in evaluation mode during the pass.
        phase: What to collect.
        dataset: Encoded examples.
        folder: The phase's folder.
        settings: The batch size counts.
        collate: Makes a batch of examples.

    Returns:
        `train_runtime` in seconds, and how many examples were looked at.
    """
    started, training = time.perf_counter(), model.training
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    size = settings.per_device_train_batch_size
    device = next(model.parameters()).device
    with Progress(phase.name, total=len(dataset)) as progress:
        for start in range(0, len(dataset), size):
            chosen = range(start, min(start + size, len(dataset)))
            batch = collate([dataset[index] for index in chosen])
            phase.step(model, {name: _to(value, device) for name, value in batch.items()})
            progress.advance(len(chosen))
    phase.finish(model, folder)
    model.train(training)
    return {"train_runtime": round(time.perf_counter() - started, 3), "examples": float(len(dataset))}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
