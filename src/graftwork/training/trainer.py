"""Training loop of all phases: `transformers.Trainer` with the loss, parameters and hooks of a phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from graftwork.core import faults
from graftwork.core.files import apply_umask
from graftwork.core.processes import is_main_process
from graftwork.core.storage import writing
from graftwork.errors import NonFiniteError
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.finiteness import LARGEST, first_of, oversized
from graftwork.surgery.quantised import accepted_by_trainer
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.arguments import training_arguments, without_validation
from graftwork.training.batching import Collator, EncodedDataset
from graftwork.training.callbacks import PhaseCallback, StopOnSignal
from graftwork.training.checkpoints import (
    CHECKPOINT_PREFIX,
    PHASE_FILE,
    last_checkpoint,
    remove_incomplete,
    write_digests,
)
from graftwork.training.context import TrainingRun, restored_forward
from graftwork.training.logging_callbacks import LogFile, TrainingProgress
from graftwork.training.phases import Phase
from graftwork.training.sampling import LengthGroups
from graftwork.training.summaries import summary_writer
from graftwork.training.validation import HeldOut, score

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput


Linked = Callable[[nn.Module], AbstractContextManager[dict[str, Tensor] | None]]
"""Context in which a model is saved with links to its base; its value is the state dict to save."""


class PhaseTrainer(Trainer):
    """Trainer whose loss, parameter groups and evaluation come from a phase.

    Differs from Trainer: a resumed run has the same batches with `group_by_length` too, and the loss of a phase is
    averaged over accumulation steps instead of summed.

    Args:
        phase: Loss and hooks.
        sampler: Order of the examples; None uses the Trainer's order.
        scale_parameter: Adafactor scales its steps by the parameter's RMS; True as in T5's pretraining.
        warmup_ratio: Share of all steps for warm-up; None uses `warmup_steps`.
        held_out: Validation data; None disables evaluation.
        linked: Context in which checkpoints link to the weights of a base, with the state dict to save; see
            `graftwork.grafting.base_reference.linked`. None saves all weights.
        arguments: Arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        sampler: Sampler[Any] | None = None,
        scale_parameter: bool = True,
        warmup_ratio: float | None = None,
        held_out: HeldOut | None = None,
        linked: Linked | None = None,
        **arguments: Any,
    ) -> None:
        # the Trainer requires a validation set even though the phase computes the metrics
        dataset: Any = None if held_out is None else held_out.dataset
        with accepted_by_trainer(arguments["model"]):
            super().__init__(**arguments, eval_dataset=dataset)
        self.phase = phase
        self.held_out = held_out
        self.linked = linked
        self.sampler = sampler
        self.scale_parameter = scale_parameter
        self.warmup_ratio = warmup_ratio
        self._metrics: dict[str, list[float]] = {}
        self._last: Mapping[str, Any] = {}
        # the Trainer sums the losses of accumulation steps if the model accepts loss keywords
        self.model_accepts_loss_kwargs = False

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Compute the phase's loss and collect its other metrics for the log."""
        self._last = inputs
        values = self.phase.step(model, inputs)
        for name, value in values.items():
            if name != "loss":
                self._metrics.setdefault(name, []).append(float(value.detach()))
        return (values["loss"], dict(values)) if return_outputs else values["loss"]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward; call `before_update` once all gradients of an update are accumulated.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        loss = super().training_step(*args, **kwargs)
        faults.point("training.loss", str(self.args.output_dir), (loss,))
        # the log is no substitute: logging_nan_inf_filter replaces such losses
        if not math.isfinite(float(loss)):
            raise self._non_finite("loss", float(loss))
        if self.accelerator.sync_gradients:
            gradients = (parameter.grad for parameter in self._own_model().parameters() if parameter.grad is not None)
            faults.point("training.gradients", str(self.args.output_dir), gradients)
            self.phase.before_update(self._own_model())
        return loss

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # the Trainer looks for the end only after a step, and a resumed training may have taken its last one
        if self._has_ended():
            self.control.should_training_stop = True
            return
        dataset: Any = self.train_dataset
        if hasattr(dataset, "begin_epoch"):
            dataset.begin_epoch(int(self.args.seed), epoch)
        base: Any = super()._run_epoch
        base(*args, epoch=epoch, **kwargs)

    def _has_ended(self) -> bool:
        stopping = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        return self.state.global_step >= self.state.max_steps or any(
            each.early_stopping_patience_counter >= each.early_stopping_patience for each in stopping
        )

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()._get_grad_norm  # pyright: ignore[reportUnknownMemberType]
        norm = base(*args, **kwargs)
        # with loss scaling, an overflow skips the update and lowers the scale
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            raise self._non_finite("gradient norm", float(norm))
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # a checkpoint of a diverged model must not be the last good one
        self._check_weights()
        base: Any = super()._save_checkpoint
        base(*args, **kwargs)
        faults.point("checkpoint.complete", self._get_output_dir(trial=None))
        # every process has written its random state
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_digests(Path(str(self.args.output_dir)) / f"{CHECKPOINT_PREFIX}{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        base: Any = super()._save
        if self.linked is None or state_dict is not None:
            base(output_dir, state_dict=state_dict)
            return
        with self.linked(pretrained(self._own_model())) as own:
            base(output_dir, state_dict=own)

    def check_final(self) -> None:
        """Check the model after its last update, which no further step of the training would show.

        Raises:
            NonFiniteError: If a weight or the loss of the last batch is NaN, infinite or so large that it overflows.
        """
        self._check_weights()
        if "labels" not in self._last or "input_ids" not in self._last:
            return
        model = self._own_model()
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                loss = float(self.phase.validate(model, self._last).get("loss", torch.zeros(())))
        finally:
            model.train(training)
        if not math.isfinite(loss):
            raise self._non_finite("loss", loss)

    def _check_weights(self) -> None:
        if names := oversized(self._own_model()):
            raise self._diverged(f"{first_of(names)} contain values that are NaN, infinite or above {LARGEST:g}", 0)

    def _non_finite(self, name: str, value: float) -> NonFiniteError:
        return self._diverged(f"The {name} is {value}", 1)

    def _diverged(self, problem: str, ahead: int) -> NonFiniteError:
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        kept = "no checkpoint was written before" if checkpoint is None else f"the last checkpoint is {checkpoint}"
        return NonFiniteError(
            f"{problem} at step {self.state.global_step + ahead}; {kept}. The model is not saved. Start anew "
            "(--overwrite) with a lower learning rate, or with bf16 instead of fp16."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the phase's metrics together with the loss."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log and return the phase's metrics on the validation data; the random state is not used."""
        if self.held_out is None:
            return {}
        unwrapped: nn.Module = self.accelerator.unwrap_model(self._own_model())  # pyright: ignore[reportUnknownMemberType]
        metrics = score(unwrapped, self.phase, self.held_out, self.args.eval_batch_size)
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the Trainer's schedule; warm-up is a share of all steps, `warmup_steps`, or the phase's default."""
        if self.warmup_ratio is not None:
            self.args.warmup_steps = round(self.warmup_ratio * num_training_steps)
        elif not self.args.warmup_steps and (own := self.phase.warmup_steps(num_training_steps)) is not None:
            self.args.warmup_steps = own
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        faults.point("checkpoint.weights", output_dir)
        super()._save_optimizer_and_scheduler(output_dir)
        apply_umask(Path(output_dir))
        faults.point("checkpoint.optimizer", output_dir)
        state = self.phase.state()
        # written before the Trainer's state, whose presence marks a checkpoint as complete
        if state and self.args.should_save:
            torch.save(dict(state), Path(output_dir) / PHASE_FILE)

    def get_optimizer_cls_and_kwargs(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the Trainer's optimiser, with T5's settings for Adafactor instead of the Trainer's."""
        base: Any = Trainer.get_optimizer_cls_and_kwargs
        cls, options = base(args, model)
        if args.optim == "adafactor":
            options = {**options, "scale_parameter": self.scale_parameter, "relative_step": False}
        return cls, options

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the Trainer's optimiser over the phase's parameter groups."""
        if self.optimizer is None and type(self.phase).parameters is not Phase.parameters:
            groups = [
                {"params": list(group.parameters), **group.options}
                for group in self.phase.parameters(self._own_model())
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self._own_model())
            self.optimizer = cls(groups, **options)
            return self.optimizer
        base: Any = super().create_optimizer  # pyright: ignore[reportUnknownMemberType]
        return base(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sampler is not None:
            return self.sampler
        own: Any = self.train_dataset
        dataset = own if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and dataset is not None:
            return LengthGroups(
                dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps, int(self.args.seed)
            )
        base: Any = super()._get_train_sampler  # pyright: ignore[reportUnknownMemberType]
        return base(train_dataset)

    def _own_model(self) -> nn.Module:
        model: Any = self.model
        return model


@dataclass(frozen=True)
class PhaseData:
    """Training and validation data of one phase, in the form that the Trainer consumes."""

    dataset: EncodedDataset
    """Encoded training examples."""
    collate: Collator
    """Makes a batch of encoded examples."""
    sampler: Sampler[Any] | None = None
    """Order of the examples; None uses the Trainer's order."""
    held_out: HeldOut | None = None
    """Validation data; None disables evaluation, early stopping and the choice of the best checkpoint."""


def train_phase(
    model: nn.Module,
    phase: Phase,
    data: PhaseData,
    folder: Path,
    settings: TrainingSettings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    device: str | None = None,
    linked: Linked | None = None,
) -> dict[str, float]:
    """Train one phase, resuming from the newest complete checkpoint in `folder`.

    Args:
        model: Converted model; changed in place.
        phase: Loss and hooks of the phase.
        data: Training and validation data.
        folder: Folder for log.jsonl, TensorBoard events and checkpoints.
        settings: Training settings.
        tokenizer: Tokenizer to save with checkpoints.
        seed: Seed of the order of examples and of dropout.
        callbacks: Additional Trainer callbacks.
        device: Device by name; None for the accelerator if there is one.
        linked: As in `PhaseTrainer`.

    Returns:
        The Trainer's final metrics: `train_loss`, `train_runtime` in seconds, …

    Raises:
        ConfigError: If TrainingArguments does not have an argument.
        NonFiniteError: If a loss, a gradient norm or a trained weight is NaN or infinite.
        KeyboardInterrupt: If the process received a signal; a checkpoint of the last step has been written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(model, settings, data, folder, seed, device)
    phase.prepare(model, tokenizer)
    stop = StopOnSignal()
    patience = settings.early_stopping if data.held_out else None
    checkpoint = last_checkpoint(folder)
    if is_main_process():
        remove_incomplete(folder)
    with summary_writer(folder, arguments) as writer:
        trainer = PhaseTrainer(
            phase,
            sampler=data.sampler,
            scale_parameter=settings.adafactor_scale_parameter,
            warmup_ratio=settings.warmup_ratio,
            held_out=data.held_out,
            linked=linked,
            model=model,
            args=arguments,
            train_dataset=data.dataset,
            data_collator=data.collate,
            processing_class=tokenizer,
            callbacks=[
                LogFile(folder / "log.jsonl"),
                *([] if writer is None else [TensorBoardCallback(writer)]),
                TrainingProgress(phase.name),
                *callbacks,
                *([EarlyStoppingCallback(patience)] if patience else []),
                stop,
            ],
        )
        state = None if checkpoint is None else checkpoint / PHASE_FILE
        run = TrainingRun(trainer, settings, resumed=checkpoint is not None)
        trainer.add_callback(PhaseCallback(run, phase, state))
        for verbose in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(verbose)
        try:
            with writing(folder), restored_forward(model):
                outcome = trainer.train(  # pyright: ignore[reportUnknownMemberType]
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
                faults.point("training.ended", folder)
        finally:
            stop.release()
    if stop.stopped:
        raise KeyboardInterrupt
    trainer.check_final()
    phase.finish(model, folder)
    return _final_metrics(trainer, outcome)


def _arguments(
    model: nn.Module, settings: TrainingSettings, data: PhaseData, folder: Path, seed: int, device: str | None
) -> TrainingArguments:
    """Convert settings to TrainingArguments, with the metric that selects the best checkpoint."""
    chosen = settings if data.held_out else without_validation(settings)
    arguments = training_arguments(chosen, folder, seed, device)
    if data.held_out is not None:
        arguments.metric_for_best_model = "accuracy" if is_classifier(pretrained(model)) else "loss"
        arguments.greater_is_better = arguments.metric_for_best_model == "accuracy"
    return arguments


def _final_metrics(trainer: PhaseTrainer, outcome: TrainOutput) -> dict[str, float]:
    """Collect the Trainer's final metrics and, if the best checkpoint was loaded, its score and step."""
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    if trainer.args.load_best_model_at_end and trainer.state.best_metric is not None:
        metrics |= {
            "best_score": float(trainer.state.best_metric),
            "best_step": float(trainer.state.best_global_step or 0),
        }
    return metrics
