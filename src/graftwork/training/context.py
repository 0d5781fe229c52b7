"""What a phase may know of the run that it is part of, and what it may borrow from the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, get_scheduler

from graftwork.settings.training import TrainingSettings


class TrainingRun:
    """A window onto the trainer, for phases that train more than the model or look at the clock.

    Args:
        trainer: The trainer.
        settings: How the user wants to train.
        resumed: Whether the run goes on from a checkpoint.
    """

    def __init__(self, trainer: Trainer, settings: TrainingSettings, *, resumed: bool) -> None:
        self._trainer: Any = trainer
        self.settings = settings
        self.resumed = resumed

    @property
    def model(self) -> nn.Module:
        """The model that is trained, without any wrapper."""
        return self._trainer.model

    @property
    def updates(self) -> int:
        """Updates of the model that are done."""
        return int(self._trainer.state.global_step)

    @property
    def total_updates(self) -> int:
        """Updates of the whole run."""
        return int(self._trainer.state.max_steps)

    @property
    def warmup_updates(self) -> int:
        """Updates over which the model's learning rate rises."""
        return int(self._trainer.args.get_warmup_steps(self.total_updates))

    @property
    def window(self) -> int:
        """Batches of the update that is being gathered; fewer than usual at the end of an epoch."""
        return int(self._trainer.current_gradient_accumulation_steps)

    @property
    def closes_window(self) -> bool:
        """Whether the batch at hand is the last one of an update."""
        return bool(self._trainer.accelerator.sync_gradients)

    @property
    def dataset(self) -> Sequence[Mapping[str, Any]]:
        """The encoded training examples."""
        return self._trainer.train_dataset

    @property
    def collate(self) -> Callable[[Sequence[Any]], Mapping[str, Tensor]]:
        """Makes a batch of encoded examples."""
        return self._trainer.data_collator

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes files."""
        return bool(self._trainer.is_world_process_zero())

    def distribute(self, model: nn.Module) -> nn.Module:
        """Ready another model for training beside the first: device, mixed precision, gradients averaged."""
        return self._trainer.accelerator.prepare_model(model)

    def place(self, model: nn.Module) -> nn.Module:
        """Put a model that is not trained on the device."""
        return model.to(self._trainer.accelerator.device)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that the model computes in."""
        return self._trainer.accelerator.autocast()

    def optimizer(self, model: nn.Module, learning_rate: float) -> Optimizer:
        """An optimiser like the model's own, for another one: same kind, same groups with and without decay."""
        trainer = self._trainer
        decayed = set(trainer.get_decay_parameter_names(model))
        named = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": trainer.args.weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        return trainer.accelerator.prepare_optimizer(cls(groups, **{**options, "lr": learning_rate}))

    def schedule(self, optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
        """A learning rate of the shape that the settings name."""
        inner = getattr(optimizer, "optimizer", optimizer)
        arguments = self._trainer.args
        return get_scheduler(
            arguments.lr_scheduler_type,
            inner,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )

    def gather(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around forward and backward of a distributed model: processes exchange gradients at an update's end only."""
        return nullcontext() if self.closes_window else self._trainer.accelerator.no_sync(model=model)

    def backward(self, loss: Tensor) -> None:
        """Backward under the run's loss scaling."""
        self._trainer.accelerator.backward(loss)

    def clip(self, model: nn.Module) -> None:
        """Clip the gradients of another model as those of the first are."""
        if self._trainer.args.max_grad_norm > 0:
            self._trainer.accelerator.clip_grad_norm_(model.parameters(), self._trainer.args.max_grad_norm)
