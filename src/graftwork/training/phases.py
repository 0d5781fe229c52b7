"""Base class of training phases, and plain fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftwork.training.batching import Batch, BatchSize, Collator, EncodedDataset, sample_batch
from graftwork.training.packing import forward
from graftwork.training.scoring import score_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.run_folder import RunFolder
    from graftwork.settings.training import TrainingSettings
    from graftwork.training.context import TrainingRun


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters with their own optimiser options."""

    parameters: Sequence[nn.Parameter]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Optimiser options of the group, such as `lr` or `weight_decay`."""


class Phase(ABC):
    """One stage of training, or one pass that collects activations or statistics."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    """True if the phase needs labelled targets."""
    collects: ClassVar[tuple[str, ...]] = ()
    """Files and folders below `artifacts/` that the phase writes; `--overwrite` removes them."""
    invalidates: ClassVar[tuple[str, ...]] = ()
    """Further ones that depend on the training but are written later; `--overwrite` removes them too."""

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """Return the trained parameters; an empty sequence makes the phase a collecting pass without an optimiser."""
        return (ParameterGroup([parameter for parameter in model.parameters() if parameter.requires_grad]),)

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """Return the training settings of this phase; by default the settings of the run."""
        return settings

    def examples(
        self, model: nn.Module, dataset: EncodedDataset, collate: Collator, run: RunFolder
    ) -> tuple[EncodedDataset, Collator]:
        """Return the training data of this phase with its collator; by default the data of the run.

        Args:
            model: Model that is trained.
            dataset: Encoded examples of the run.
            collate: Collator of `dataset`.
            run: Run folder, for phases that read the artifacts of an earlier phase.
        """
        return dataset, collate

    def sample_batch(self, model: nn.Module, size: BatchSize) -> Batch:
        """Return a batch of the given size with arbitrary values, on which a memory estimate runs `step`."""
        return sample_batch(model, size)

    @abstractmethod
    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Run one forward pass; return metrics by name, including the scalar "loss" if parameters are trained."""

    def validate(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the metrics of one validation batch; by default the loss, and accuracy for a classifier.

        Called in evaluation mode and without gradients.
        """
        return score_batch(model, batch)[0]

    def prepare(  # noqa: B027 (most phases need no preparation)
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Prepare the phase before the trainer is created; the model has its initial weights.

        Args:
            model: Model that is trained.
            tokenizer: Tokenizer of the training data.
        """

    def begin(self, run: TrainingRun) -> None:  # noqa: B027
        """Set up the phase before the first step; also called when a run resumes, in a new process."""

    def warmup_steps(self, updates: int) -> int | None:
        """Return the number of warm-up updates if the settings define none; None disables warm-up.

        Args:
            updates: Number of updates of the whole phase.
        """
        return None

    def before_update(self, model: nn.Module) -> None:  # noqa: B027
        """Inspect or modify the accumulated gradients before an update."""

    def after_update(self, updates: int) -> None:  # noqa: B027
        """React to an update of the model; `updates` is the number of finished updates."""

    def state(self) -> Mapping[str, Any]:
        """Return the state to save in checkpoints: tensors, numbers and texts in plain containers."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore a state that `state` returned; called after `begin`."""

    def finish(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 (most phases collect nothing)
        """Write collected values to `folder`."""


class Finetune(Phase):
    """Fine-tuning of all trainable parameters with the model's loss."""

    name: ClassVar[str] = "finetune"

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the model's loss, averaged over the labelled tokens of the batch."""
        return {"loss": forward(model, batch).loss}
