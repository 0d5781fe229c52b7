"""Interface of the trainer that a phase can use: state of the run, optimisers, distribution and precision."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, optimization

from graftwork.settings.training import TrainingSettings
from graftwork.training.batching import Collator


class TrainingRun:
    """Interface to the trainer for phases that train a second model or depend on the number of updates.

    Args:
        trainer: Trainer of the phase.
        settings: Training settings.
        resumed: True if the run resumes from a checkpoint.
    """

    def __init__(self, trainer: Trainer, settings: TrainingSettings, *, resumed: bool) -> None:
        self._trainer: Any = trainer
        self.settings = settings
        self.resumed = resumed

    @property
    def model(self) -> nn.Module:
        """Model that is trained, without distributed wrappers."""
        return self._trainer.model

    @property
    def updates(self) -> int:
        """Number of finished optimiser updates."""
        return int(self._trainer.state.global_step)

    @property
    def total_updates(self) -> int:
        """Number of optimiser updates of the whole run."""
        return int(self._trainer.state.max_steps)

    @property
    def warmup_updates(self) -> int:
        """Number of warm-up updates."""
        return int(self._trainer.args.get_warmup_steps(self.total_updates))

    @property
    def window(self) -> int:
        """Number of accumulation batches of the current update; smaller at the end of an epoch."""
        return int(self._trainer.current_gradient_accumulation_steps)

    @property
    def closes_window(self) -> bool:
        """True if the current batch is the last accumulation batch of an update."""
        return bool(self._trainer.accelerator.sync_gradients)

    @property
    def dataset(self) -> Sequence[Mapping[str, Any]]:
        """Encoded training examples."""
        return self._trainer.train_dataset

    @property
    def collate(self) -> Collator:
        """Collator of encoded examples."""
        return self._trainer.data_collator

    @property
    def is_main_process(self) -> bool:
        """True in the process that writes files."""
        return bool(self._trainer.is_world_process_zero())

    def distribute(self, model: nn.Module) -> nn.Module:
        """Prepare a second model for training: device, mixed precision and gradient averaging."""
        return self._trainer.accelerator.prepare_model(model, device_placement=not is_spread(model))

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model that is not trained to the device; a copy of a model on several devices stays on them."""
        return model if is_spread(model) else model.to(self._trainer.accelerator.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context of the run's mixed precision."""
        return self._trainer.accelerator.autocast()

    def optimizer(self, model: nn.Module, learning_rate: float) -> Optimizer:
        """Create an optimiser for a second model, with the class and weight-decay groups of the first."""
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
        """Create a learning-rate scheduler of the configured type."""
        inner = getattr(optimizer, "optimizer", optimizer)
        arguments = self._trainer.args
        create: Any = optimization.get_scheduler  # pyright: ignore[reportUnknownMemberType]
        return create(
            arguments.lr_scheduler_type,
            inner,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )

    def gather(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context for forward and backward that synchronises gradients only on the last batch of an update."""
        return nullcontext() if self.closes_window else self._trainer.accelerator.no_sync(model=model)

    def backward(self, loss: Tensor) -> None:
        """Run backward of `loss` [scalar] with the run's loss scaling."""
        self._trainer.accelerator.backward(loss)

    def clip(self, model: nn.Module) -> None:
        """Clip the gradients of a second model to `max_grad_norm`."""
        if self._trainer.args.max_grad_norm > 0:
            self._trainer.accelerator.clip_grad_norm_(model.parameters(), self._trainer.args.max_grad_norm)


def is_spread(model: nn.Module) -> bool:
    """True if the parameters of a model are on several devices."""
    return len({parameter.device for parameter in model.parameters()}) > 1


@contextmanager
def restored_forward(model: nn.Module) -> Generator[None]:
    """Restore the forward method afterwards: mixed precision wraps it permanently, which would change the probe."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.forward = before
