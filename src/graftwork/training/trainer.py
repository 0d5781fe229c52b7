"""The one training loop: `transformers.Trainer`, told what a phase wants."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from graftwork.core.files import append_line, drop_torn_line, read_json, read_lines, write_text
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, GraftworkError
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.callbacks import PhaseClock, StopOnSignal
from graftwork.training.context import TrainingRun
from graftwork.training.phases import Phase
from graftwork.training.validation import HeldOut, score

CHECKPOINT_PREFIX = "checkpoint-"
PHASE_FILE = "phase.pt"
"""What a phase keeps in a checkpoint, beside the Trainer's files."""


class PhaseTrainer(Trainer):
    """A Trainer whose loss, parameters and order of examples come from a phase.

    Differs from Trainer: a resumed run sees the same batches under `group_by_length` too, and the loss of a phase is
    averaged over accumulation steps instead of summed.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        sampler: Sampler[Any] | None = None,
        scale_parameter: bool = True,
        warmup_ratio: float | None = None,
        held_out: HeldOut | None = None,
        **arguments: Any,
    ) -> None:
        # the Trainer wants to see what it scores on, though the phase does the scoring
        super().__init__(**arguments, eval_dataset=None if held_out is None else held_out.dataset)
        self.phase = phase
        self.held_out = held_out
        self.sampler = sampler
        self.scale_parameter = scale_parameter
        self.warmup_ratio = warmup_ratio
        self._numbers: dict[str, list[float]] = {}
        # a model that takes loss keywords would make the Trainer sum the losses of accumulation steps (design 5.7)
        self.model_accepts_loss_kwargs = False

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The phase's loss; its other numbers go to the log."""
        values = self.phase.step(model, inputs)
        for name, value in values.items():
            if name != "loss":
                self._numbers.setdefault(name, []).append(float(value.detach()))
        return (values["loss"], dict(values)) if return_outputs else values["loss"]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; the phase looks at the gradients once all of an update are there."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.phase.before_update(self.model)  # type: ignore[arg-type]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the phase's numbers beside the loss."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._numbers.items()}}
            self._numbers.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The phase's numbers on what is held out, into the log; no random number is drawn."""
        if self.held_out is None:
            return {}
        numbers = score(self.accelerator.unwrap_model(self.model), self.phase, self.held_out, self.args.eval_batch_size)
        self.log(dict(numbers))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        return numbers

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's schedule, with a warm-up that is a share of all steps or the phase's own."""
        if self.warmup_ratio is not None:
            self.args.warmup_steps = round(self.warmup_ratio * num_training_steps)
        elif not self.args.warmup_steps and (own := self.phase.warmup_steps(num_training_steps)) is not None:
            self.args.warmup_steps = own
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.phase.state()
        # before the Trainer's own state, whose presence says that a checkpoint is whole
        if state and self.args.should_save:
            torch.save(dict(state), Path(output_dir) / PHASE_FILE)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        """The Trainer's choice, with Adafactor as T5 was trained, where the Trainer has a common recipe of its own."""
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.optim == "adafactor":
            options = {**options, "scale_parameter": self.scale_parameter, "relative_step": False}
        return cls, options

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimiser over the phase's parameter groups."""
        if self.optimizer is None and type(self.phase).parameters is not Phase.parameters:
            groups = [
                {"params": list(group.parameters), **group.options}
                for group in self.phase.parameters(self.model)  # type: ignore[arg-type]
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
            self.optimizer = cls(groups, **options)
            return self.optimizer
        return super().create_optimizer(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sampler is not None:
            return self.sampler
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and dataset is not None:
            return LengthGroups(
                dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps, int(self.args.seed)
            )
        return super()._get_train_sampler(train_dataset)


class LengthGroups(Sampler[int]):
    """Transformers' length grouping, in an order that depends on the seed and the epoch alone."""

    def __init__(self, dataset: Any, group: int, seed: int) -> None:
        self.dataset = dataset
        self.group = group
        self.seed = seed
        self.epoch = 0
        self.lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(LengthGroupedSampler(self.group, lengths=self.lengths, generator=generator))


class LogFile(TrainerCallback):
    """Writes what the Trainer logs as JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what was logged after the checkpoint that this run goes on from."""
        if not state.is_world_process_zero:
            return
        drop_torn_line(self.path)
        # the closing line of a run that was stopped tells of a part only
        kept = [
            row
            for row in read_lines(self.path)
            if row.get("step", 0) <= state.global_step and "train_runtime" not in row
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """One line for each log."""
        if state.is_world_process_zero:
            append_line(self.path, {"step": state.global_step, **(logs or {})})


class TrainingProgress(TrainerCallback):
    """Steps and loss on stderr; the Trainer's own callbacks write to stdout, which is for results."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress = Progress(name, total=0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the step that a resumed run goes on from."""
        if state.is_world_process_zero:
            self.progress = Progress(self.name, total=state.max_steps).__enter__()
            self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more step."""
        if state.is_world_process_zero:
            self.progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            self.progress.describe(f"{self.name}, loss {float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it stands."""
        self.progress.__exit__(None, None, None)


def train_phase(
    model: nn.Module,
    phase: Phase,
    dataset: Dataset[Any],
    folder: Path,
    settings: TrainingSettings,
    *,
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    sampler: Sampler[Any] | None = None,
    held_out: HeldOut | None = None,
) -> dict[str, float]:
    """Train one phase, going on from the newest whole checkpoint in `folder`.

    Args:
        model: Converted model; changed in place.
        phase: What to compute in each step.
        dataset: Encoded examples.
        folder: Receives log.jsonl, TensorBoard events and checkpoints.
        settings: How to train.
        collate: Makes a batch of examples.
        tokenizer: Saved beside checkpoints.
        seed: Seed of the order of examples and of dropout.
        callbacks: More Trainer callbacks.
        sampler: Order of the examples, if it is not the Trainer's.
        held_out: Examples to score on the way.

    Returns:
        The Trainer's closing numbers: `train_loss`, `train_runtime` in seconds, …

    Raises:
        ConfigError: If an argument is unknown to TrainingArguments.
        GraftworkError: If the loss stopped being a number.
        KeyboardInterrupt: If the process was asked to stop; a checkpoint of the last step is there.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(settings if held_out else _unscored(settings), folder, seed)
    if held_out is not None:
        arguments.metric_for_best_model = "accuracy" if is_classifier(pretrained(model)) else "loss"
        arguments.greater_is_better = arguments.metric_for_best_model == "accuracy"
    phase.prepare(model, tokenizer)
    stop = StopOnSignal()
    writer = SummaryWriter(str(folder / "tensorboard")) if arguments.process_index == 0 else None
    checkpoint = last_checkpoint(folder)
    trainer = PhaseTrainer(
        phase,
        sampler=sampler,
        scale_parameter=settings.adafactor_scale_parameter,
        warmup_ratio=settings.warmup_ratio,
        held_out=held_out,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[
            LogFile(folder / "log.jsonl"),
            *([] if writer is None else [TensorBoardCallback(writer)]),
            TrainingProgress(phase.name),
            *callbacks,
            *([EarlyStoppingCallback(settings.early_stopping)] if held_out and settings.early_stopping else []),
            stop,
        ],
    )
    state = None if checkpoint is None else checkpoint / PHASE_FILE
    trainer.add_callback(PhaseClock(TrainingRun(trainer, settings, resumed=checkpoint is not None), phase, state))
    for loud in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(loud)
    try:
        with _own_forward(model):
            outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        stop.release()
        if writer is not None:
            writer.close()
    if stop.stopped:
        raise KeyboardInterrupt
    if not math.isfinite(outcome.training_loss):
        raise GraftworkError(
            f"The training loss is {outcome.training_loss} after {outcome.global_step} steps. "
            "Lower the learning rate, or use bf16 in place of fp16."
        )
    phase.finish(model, folder)
    closing = {name: float(value) for name, value in outcome.metrics.items()}
    if arguments.load_best_model_at_end and trainer.state.best_metric is not None:
        closing |= {
            "best_score": float(trainer.state.best_metric),
            "best_step": float(trainer.state.best_global_step or 0),
        }
    return closing


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Give a model its forward pass back, which mixed precision wraps for good: a saved model would be probed in it."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.forward = before


def _unscored(settings: TrainingSettings) -> TrainingSettings:
    """Settings of a phase that learns from data of its own, of which nothing is held out."""
    return dataclasses.replace(
        settings,
        validation=None,
        eval_steps=None,
        load_best_model_at_end=False,
        early_stopping=None,
    )


def training_arguments(settings: TrainingSettings, folder: Path, seed: int) -> TrainingArguments:
    """Settings as transformers wants them.

    Raises:
        ConfigError: If `arguments` holds a name that TrainingArguments does not have, or a value that it refuses.
    """
    from difflib import get_close_matches

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in settings.arguments:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Unknown key {name!r} in train.arguments.{hint} Expected a field of TrainingArguments.")
    shared = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name in known
    }
    if "activation_checkpointing" in known:
        # the name of transformers 5.23; the old one warns there
        shared["activation_checkpointing"] = shared.pop("gradient_checkpointing")
    micro, accumulation = settings.passes(int(os.environ.get("WORLD_SIZE", "1")))
    shared |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    if settings.max_grad_norm is None:
        shared["max_grad_norm"] = 0.0
    if settings.validation is not None:
        shared |= {"eval_strategy": "steps", "eval_steps": settings.steps_between_scores}
        # a resumed run has to remember how long nothing was better
        shared |= {"load_best_model_at_end": settings.keeps_best, "restore_callback_states_from_checkpoint": True}
    # pinned memory serves an accelerator only, and torch warns where there is none
    shared["dataloader_pin_memory"] = torch.accelerator.is_available()
    # without it, transformers refuses bf16 where there is no accelerator
    shared["use_cpu"] = not torch.accelerator.is_available()
    fixed = {"output_dir": str(folder), "seed": seed, "remove_unused_columns": False, "report_to": "none"}
    try:
        return TrainingArguments(**{**shared, **fixed, **settings.arguments})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Training settings were refused: {error}") from None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = sorted(
        (path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.name[len(CHECKPOINT_PREFIX) :].isdigit()),
        key=lambda path: int(path.name[len(CHECKPOINT_PREFIX) :]),
        reverse=True,
    )
    return next((path for path in found if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    # the Trainer writes its state last, so a readable state means that everything before it is there
    state = checkpoint / "trainer_state.json"
    if not state.exists():
        return False
    try:
        return isinstance(read_json(state), dict)
    except GraftworkError:
        return False
