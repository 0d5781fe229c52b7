"""Memory of training: real optimiser updates of a phase on fake tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import operations  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graftwork.metrics.memory import MemoryRecorder, bytes_of
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import pretrained
from graftwork.training.batching import Batch, BatchSize
from graftwork.training.context import TrainingRun, is_spread
from graftwork.training.phases import Phase
from graftwork.training.stationary import StationaryTrainer
from graftwork.training.trainer import PhaseTrainer


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one training phase, over all devices."""

    weights: int
    """Parameters and buffers of the model."""
    gradients: int
    optimizer: int
    """State of the optimiser."""
    other: int
    """Whatever else stays between updates, such as a teacher with its optimiser."""
    activations: int
    """Memory that the forward and backward pass add at their peak."""
    peak: int
    devices: Mapping[str, int]
    """Peak of each device."""


class SampleData:
    """Data set of one row, whose collator returns a batch of the estimate's size."""

    def __init__(self, phase: Phase, model: nn.Module, size: BatchSize) -> None:
        self.phase, self.model, self.size = phase, model, size

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"input_ids": [1] * self.size.input_tokens}

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Return a batch of the estimate's size."""
        return self.phase.sample_batch(self.model, self.size)


class FakeRun(TrainingRun):
    """Interface of the trainer for phases, without moving anything to the device of this machine."""

    def __init__(self, trainer: PhaseTrainer, settings: TrainingSettings) -> None:
        super().__init__(trainer, settings, resumed=False)
        self.done = 0
        self.passes = 1
        self.last = True
        self.gradient_bytes = 0
        self.precision = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return pretrained(self.model).device

    @property
    def updates(self) -> int:
        """Number of finished updates."""
        return self.done

    @property
    def total_updates(self) -> int:
        """Number of updates of the training; a large number, so that no phase has its last update."""
        return 1_000_000

    @property
    def warmup_updates(self) -> int:
        """Number of warm-up updates."""
        return 1

    @property
    def window(self) -> int:
        """Number of accumulation batches of the current update."""
        return self.passes

    @property
    def closes_window(self) -> bool:
        """True if the current batch is the last one of an update."""
        return self.last

    @property
    def is_main_process(self) -> bool:
        """False: nothing is written."""
        return False

    def distribute(self, model: nn.Module) -> nn.Module:
        """Return the model with the forward pass of the run's mixed precision."""
        return with_precision(self.place(model), self.device.type, self.precision)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device of the trained one."""
        return model if is_spread(model) else model.to(self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context of the run's mixed precision."""
        enabled = self.precision is not None
        context: Any = torch.autocast(self.device.type, self.precision, enabled=enabled)
        return context

    def optimizer(self, model: nn.Module, learning_rate: float) -> Optimizer:
        """Create an optimiser for a second model."""
        cls, options = self._trainer.get_optimizer_cls_and_kwargs(self._trainer.args, model)
        return cls(model.parameters(), **{**options, "lr": learning_rate})

    def schedule(self, optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
        """Create a constant schedule."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def gather(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context that changes nothing: one process has no gradients to average."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run backward of `loss` [scalar]."""
        loss.backward()  # pyright: ignore[reportUnknownMemberType]

    def clip(self, model: nn.Module) -> None:
        """Clip the gradients of a second model."""
        clip(model.parameters(), self.settings)


def with_precision(model: nn.Module, device: str, dtype: torch.dtype | None) -> nn.Module:
    """Wrap the forward pass as accelerate does for mixed precision: autocast, and outputs in float32."""
    if dtype is None:
        return model
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            return inner(*args, **kwargs)

    wrapped: Any = operations
    model.forward = wrapped.convert_outputs_to_fp32(forward)
    return model


def clip(parameters: Any, settings: TrainingSettings) -> None:
    """Clip gradients as the trainer does."""
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(list(parameters), settings.max_grad_norm)


def measure_training(
    model: nn.Module,
    phase: Phase,
    settings: TrainingSettings,
    size: BatchSize,
    recorder: MemoryRecorder,
    tokenizer: Any,
) -> TrainingMemory:
    """Run two updates of a phase, and return the memory of the second one, with which the optimiser has its state.

    Args:
        model: Model, with or without values.
        phase: Phase with parameters to train.
        settings: Settings of the run.
        size: Size of a batch.
        recorder: Recorder that has seen the model being built.
        tokenizer: Tokenizer for phases that read it.
    """
    settings = phase.settings(settings)
    with training_run(model, phase, settings, size, tokenizer) as run:
        trainer: Any = run.trainer
        take_update(run, phase, 1)
        between = recorder.live_bytes
        recorder.reset_peak()
        take_update(run, phase, min(2, settings.passes()[1]))
        gradients = run.gradient_bytes
        state = bytes_of([v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)])
        weights = bytes_of([*model.parameters(), *model.buffers()])
        devices = dict(recorder.peak)
        other = max(0, between - weights - state)
        return TrainingMemory(
            weights,
            gradients,
            state,
            other,
            max(0, recorder.peak_bytes - weights - state - other - gradients),
            recorder.peak_bytes,
            devices,
        )


class _Run(FakeRun):
    """Run with its trainer."""

    @property
    def trainer(self) -> PhaseTrainer:
        """Trainer, for its optimiser."""
        return self._trainer


@contextmanager
def training_run(
    model: nn.Module, phase: Phase, settings: TrainingSettings, size: BatchSize, tokenizer: Any
) -> Generator[_Run]:
    """Prepare a phase as `train_phase` does: trainer, optimiser, checkpointing, mixed precision.

    Args:
        model: Model that is trained.
        phase: Phase with parameters to train.
        settings: Settings of the phase.
        size: Size of a batch.
        tokenizer: Tokenizer for phases that read it.
    """
    data = SampleData(phase, model, size)
    if settings.gradient_checkpointing:
        inner: Any = pretrained(model)
        # name since transformers 5.23, where the old name logs a warning
        enable = "activation_checkpointing_enable"
        getattr(inner, enable if hasattr(inner, enable) else "gradient_checkpointing_enable")()
        if model is not inner:
            inner.enable_input_require_grads()
    phase.prepare(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = StationaryTrainer(model, phase, data, data.collate, Path(folder), settings)
    own = model.__dict__.get("forward")
    run = _Run(trainer, settings)
    with_precision(model, run.device.type, run.precision)
    model.train()
    trainer.create_optimizer()
    phase.begin(run)
    try:
        yield run
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own


def take_update(run: _Run, phase: Phase, passes: int) -> None:
    """Run one optimiser update: forward and backward of every accumulated batch, hooks, clipping, step."""
    trainer: Any = run.trainer
    model = run.model
    run.passes = passes
    for number in range(passes):
        run.last = number == passes - 1
        batch = phase.sample_batch(model, trainer.train_dataset.size)
        model.train()
        values = phase.step(model, batch)
        loss: Any = values["loss"]
        del values
        (loss / passes).backward()
        del loss, batch
    phase.before_update(model)
    run.gradient_bytes = bytes_of([p.grad for p in model.parameters() if p.grad is not None])
    clip([p for p in model.parameters() if p.grad is not None], run.settings)
    trainer.optimizer.step()
    run.done += 1
    model.zero_grad(set_to_none=True)
    phase.after_update(run.done)
