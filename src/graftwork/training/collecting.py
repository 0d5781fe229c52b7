"""Phases without an optimiser: one pass over the data that collects activations or statistics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.progress import Progress
from graftwork.settings.training import TrainingSettings
from graftwork.training.batching import Collator, EncodedDataset
from graftwork.training.phases import Phase


@torch.no_grad()
def collect_phase(
    model: nn.Module,
    phase: Phase,
    dataset: EncodedDataset,
    folder: Path,
    settings: TrainingSettings,
    *,
    collate: Collator,
) -> dict[str, float]:
    """Call a phase's `step` on every batch in order, then its `finish`.

    An interrupted pass restarts from the beginning, because collected values are written only at the end.

    Args:
        model: Converted model; in evaluation mode during the pass.
        phase: Phase that collects.
        dataset: Encoded examples.
        folder: Folder of the phase.
        settings: Training settings, of which only the batch size is used.
        collate: Makes a batch of encoded examples.

    Returns:
        `train_runtime` in seconds, and `examples`, the number of examples.
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
