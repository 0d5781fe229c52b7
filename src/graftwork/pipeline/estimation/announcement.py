"""Estimate that precedes a training: one line, and a warning if the device is too small."""

from __future__ import annotations

import logging
from typing import Any

from graftwork.core.devices import CPU, device_memory, training_device
from graftwork.core.messages import say
from graftwork.grafting.converted import Converted
from graftwork.pipeline.estimation.estimate import Estimator, Shape
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import is_classifier, pretrained

logger = logging.getLogger(__name__)

SMALL = 50_000_000
"""Number of parameters below which nothing is estimated, because such a model fits everywhere."""


def announce(converted: Converted, settings: TrainingSettings, device: str | None = None) -> None:
    """Print the estimated memory of a training, and warn if the device has less. A failed estimate is one line.

    Args:
        converted: Model to train.
        settings: Settings of the training.
        device: Device that the training asks for; None for the accelerator if there is one.
    """
    inner: Any = pretrained(converted.model)
    if sum(parameter.numel() for parameter in inner.parameters()) < SMALL:
        return
    device = training_device(device)
    available = device_memory(device)
    # accelerators of other kinds are estimated as CUDA
    kind = CPU if device == CPU else "cuda"
    try:
        labels = tuple(inner.config.id2label.values()) if is_classifier(inner) else None
        shape = Shape(kind, str(inner.dtype).removeprefix("torch."), labels)
        phase, _, memory = Estimator(inner.config, shape).training(converted.methods, settings)
    # an estimate must never prevent a training
    except Exception as error:
        logger.debug("The estimate failed.", exc_info=True)
        say(f"The memory of this training could not be estimated ({type(error).__name__}); it starts anyway.")
        return
    if memory is None:
        return
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "other": memory.other,
        "activations": memory.activations,
    }
    say(
        f"Memory of phase {phase} on {device} (estimated): {gigabytes(memory.peak)} = "
        + " + ".join(f"{name} {gigabytes(part)}" for name, part in parts.items() if part)
    )
    if memory.peak > available:
        logger.warning(
            "This training needs %s (estimated), and the device has %s. Expect it to run out of memory; lower "
            "per_device_train_batch_size, set gradient_checkpointing, or see `graftwork estimate --fit %.0fGB`.",
            gigabytes(memory.peak),
            gigabytes(available),
            available / 1e9,
        )


def gigabytes(count: float) -> str:
    """Bytes as text in GB (10⁹ bytes).

    Example:
        >>> gigabytes(1_250_000_000)
        '1.25 GB'
    """
    value = count / 1e9
    return f"{value:.2f} GB" if value < 100 else f"{value:.0f} GB"
