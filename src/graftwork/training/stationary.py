"""Trainer for single updates of a model that stays on its device, as memory estimates need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from graftwork.settings.training import TrainingSettings
from graftwork.training.arguments import training_arguments, without_validation
from graftwork.training.batching import Collator
from graftwork.training.phases import Phase
from graftwork.training.trainer import PhaseTrainer


class StationaryTrainer(PhaseTrainer):
    """Trainer of a phase that leaves the model on its device, without callbacks.

    Args:
        model: Model that is trained.
        phase: Loss and hooks.
        dataset: Encoded examples.
        collate: Their collator.
        folder: Output folder; nothing is written.
        settings: Training settings.
    """

    def __init__(
        self,
        model: nn.Module,
        phase: Phase,
        dataset: Any,
        collate: Collator,
        folder: Path,
        settings: TrainingSettings,
    ) -> None:
        super().__init__(
            phase,
            scale_parameter=settings.adafactor_scale_parameter,
            model=model,
            args=training_arguments(without_validation(settings), folder, 0),
            train_dataset=dataset,
            data_collator=collate,
        )

    def _move_model_to_device(self, model: Any, device: Any) -> Any:
        return model
