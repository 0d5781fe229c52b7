"""Conversion of training settings to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import logging
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from graftwork.core.devices import trains_on_cpu
from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings

logger = logging.getLogger(__name__)


def training_arguments(
    settings: TrainingSettings, folder: Path, seed: int, device: str | None = None
) -> TrainingArguments:
    """Convert settings to TrainingArguments.

    Args:
        settings: Training settings; fields with the name of an argument are passed on.
        folder: Output folder of checkpoints.
        seed: Seed of the order of examples and of dropout.
        device: Device by name; None for the accelerator if there is one.

    Raises:
        ConfigError: If the Trainer cannot use the device, or if `arguments` contains a name that TrainingArguments does
            not have, or an invalid value.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in settings.arguments:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Unknown key {name!r} in train.arguments.{hint} Expected a field of TrainingArguments.")
    shared: dict[str, Any] = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name in known
    }
    if "activation_checkpointing" in known:
        # name since transformers 5.23, where the old name logs a warning
        shared["activation_checkpointing"] = shared.pop("gradient_checkpointing")
    micro, accumulation = settings.passes(int(os.environ.get("WORLD_SIZE", "1")))
    shared |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    if settings.max_grad_norm is None:
        shared["max_grad_norm"] = 0.0
    if settings.validation is not None:
        shared |= {"eval_strategy": "steps", "eval_steps": settings.steps_between_scores}
        # restore the counter of early stopping when a run resumes
        shared |= {"load_best_model_at_end": settings.keeps_best, "restore_callback_states_from_checkpoint": True}
    # pinned memory is useful with an accelerator only; torch warns otherwise
    on_cpu = trains_on_cpu(device)
    shared["dataloader_pin_memory"] = not on_cpu
    # without use_cpu, transformers refuses bf16 on a machine without accelerator
    shared["use_cpu"] = on_cpu
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "remove_unused_columns": False,
        "report_to": "none",
    }
    try:
        arguments = TrainingArguments(**{**shared, **fixed, **settings.arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Training settings were refused: {error}") from None
    if arguments.n_gpu > 1:
        logger.warning(
            "Training on the first of %d accelerators. Start with `torchrun --nproc-per-node %d` to use all.",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        # one process with several would use DataParallel, whose replicas have no gradients of their own
        arguments._n_gpu = 1
    return arguments


def without_validation(settings: TrainingSettings) -> TrainingSettings:
    """Return the settings without evaluation, early stopping and best checkpoint, for a phase without held-out data."""
    return dataclasses.replace(
        settings, validation=None, eval_steps=None, load_best_model_at_end=False, early_stopping=None
    )
