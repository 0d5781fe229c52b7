"""The training phase protocol, and plain fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftwork.training.packing import forward
from graftwork.training.scoring import score_batch

if TYPE_CHECKING:
    from graftwork.core.run_folder import RunFolder
    from graftwork.settings.training import TrainingSettings
    from graftwork.training.context import TrainingRun


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that one optimiser setting applies to."""

    parameters: Sequence[nn.Parameter]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the optimiser for this group, such as `lr` or `weight_decay`."""


class Phase(ABC):
    """One stretch of training, or one pass that collects something."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    """Whether there is nothing to learn without targets; a phase that only looks at texts says no."""
    collects: ClassVar[tuple[str, ...]] = ()
    """Folders below `artifacts/` that go with the training: starting anew removes them."""

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """What is trained; an empty sequence makes this a collecting pass without an optimiser."""
        return (ParameterGroup([parameter for parameter in model.parameters() if parameter.requires_grad]),)

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """How this phase is trained, if otherwise than the run's settings say."""
        return settings

    def examples(self, model: nn.Module, dataset: Any, collate: Any, run: RunFolder) -> tuple[Any, Any]:
        """What steps are taken on, and what makes batches of it; the run's own data unless a phase brings other."""
        return dataset, collate

    @abstractmethod
    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """One forward pass; returns at least "loss", a scalar, when there is something to train."""

    def validate(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Numbers of one batch that is held out: the loss, and accuracy for a model with classes, unless a phase adds.

        Called in evaluation mode and without gradients.
        """
        return score_batch(model, batch)[0]

    def prepare(self, model: nn.Module, tokenizer: Any) -> None:  # noqa: B027 (most phases need nothing)
        """Get ready before the trainer exists; the model has the weights that training starts from.

        Args:
            model: What is trained.
            tokenizer: What made, or will make, the batches.
        """

    def begin(self, run: TrainingRun) -> None:  # noqa: B027
        """Get ready before the first step; called again, in a new process, when a stopped run goes on."""

    def warmup_steps(self, updates: int) -> int | None:
        """Updates over which the learning rate rises, where the settings leave it open; None for none."""
        return None

    def before_update(self, model: nn.Module) -> None:  # noqa: B027
        """Look at gradients, or drop some, when all of an update are there."""

    def after_update(self, updates: int) -> None:  # noqa: B027
        """Do what follows an update of the model; `updates` counts those that are done."""

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must hold for this phase to go on: tensors, numbers and texts in plain containers."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state` returned; called after `begin`."""

    def finish(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 (most phases collect nothing)
        """Write what was collected into `folder`."""


class Finetune(Phase):
    """Train all trainable weights on the model's own loss."""

    name: ClassVar[str] = "finetune"

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The loss that the model computes for labels, averaged over the tokens of the batch."""
        return {"loss": forward(model, batch).loss}
