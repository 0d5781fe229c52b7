"""Conversion of training settings to `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings


def training_arguments(settings: TrainingSettings, folder: Path, seed: int) -> TrainingArguments:
    """Convert settings to TrainingArguments.

    Args:
        settings: Training settings; fields with the name of an argument are passed on.
        folder: Output folder of checkpoints.
        seed: Seed of the order of examples and of dropout.

    Raises:
        ConfigError: If `arguments` contains a name that TrainingArguments does not have, or an invalid value.
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
    shared["dataloader_pin_memory"] = torch.accelerator.is_available()
    # without use_cpu, transformers refuses bf16 on a machine without accelerator
    shared["use_cpu"] = not torch.accelerator.is_available()
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "remove_unused_columns": False,
        "report_to": "none",
    }
    try:
        return TrainingArguments(**{**shared, **fixed, **settings.arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Training settings were refused: {error}") from None
