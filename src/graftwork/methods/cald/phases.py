"""Training phase of CALD: task loss plus distances to the teacher of the guide."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.cald import calibration, weights
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.distances import layer_distances, layer_loss, output_divergence
from graftwork.methods.cald.guides import Guide, dense_copy, has_no_values, make_guide
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import pretrained
from graftwork.training.context import TrainingRun
from graftwork.training.phases import Phase
from graftwork.training.samples import batches
from graftwork.training.scoring import score_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_WARMUP = 0.04
"""Share of the updates in the default warm-up of the authors' code, rounded down."""


class Distill(Phase):
    """Fine-tuning of a converted model with layer-wise and output distillation from a teacher.

    loss = CE + α_layer · Σ_i d_i + α_output · T² · KL(teacher ‖ student), with the distances d_i of the hidden states.

    Source: He & Garner 2025, equation of the training objective; the authors' four training scripts, part nlp.

    Args:
        config: Guide and weights of the losses.
    """

    name: ClassVar[str] = "distill"

    def __init__(self, config: CaldConfig) -> None:
        self.config = config
        self.guide: Guide | None = None
        self._run: TrainingRun | None = None
        self._dense: nn.Module | None = None
        self._reference_model: nn.Module | None = None

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Create the teacher, then load the student's initial weights.

        Raises:
            ConfigError: If the model is wrapped by PEFT, so that its weights have other names than the teacher's.
            CheckpointMismatchError: If names or shapes of weights differ.
        """
        config = self.config
        self.guide = make_guide(config)
        if model is not pretrained(model) and (self.guide is not None or config.starts_from_target):
            raise ConfigError(
                f"train.lora is on and guide is {config.guide!r}. Expected full fine-tuning of a guided student. Omit "
                "lora, or set guide to unguided."
            )
        if self.guide is not None:
            self.guide.prepare(model)
        if config.starts_from_target and not has_no_values(model):
            weights.load_dense(model, weights.weights_file(str(config.teacher)))
        if config.initialization == "svd":
            self._dense = dense_copy(model)

    def begin(self, run: TrainingRun) -> None:
        """Check sequence lengths, initialise the matrices by SVD if configured, and start the guide.

        Raises:
            ConfigError: If an example has more tokens than the compression has positions.
        """
        self._run = run
        self._check_lengths(run)
        if self._dense is not None and not run.resumed:
            calibration.initialize(run.model, run.place(self._dense), batches(run.dataset, run.collate))
        self._dense = None
        if self.guide is not None:
            self.guide.begin(run)

    def warmup_steps(self, updates: int) -> int | None:
        """Return the authors' default of 4 % with `compat`, else None."""
        return int(REFERENCE_WARMUP * updates) if self.config.compat else None

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Compute the task loss, plus the weighted distances to the teacher during the guided updates."""
        config, run = self.config, self._run
        teacher = None
        if self.guide is not None and self._guided(run):
            teacher = self.guide.outputs(batch)
        outputs = model(**batch, output_hidden_states=teacher is not None)
        loss, values = outputs.loss, {"ce": outputs.loss.detach()}
        if teacher is not None and config.effective_layer_weight > 0:
            mask = batch.get("attention_mask")
            distances = layer_distances(
                outputs.hidden_states, teacher.hidden_states, None if mask is None else mask.bool(), config
            )
            layer = layer_loss(distances, config)
            loss = loss + config.effective_layer_weight * layer
            values |= {"layer": layer.detach(), **{f"layer_{i}": d.detach() for i, d in distances.items()}}
        if teacher is not None and config.output_weight > 0:
            divergence = output_divergence(outputs.logits, teacher.logits, config)
            loss = loss + config.output_weight * divergence
            values["output"] = divergence.detach()
        if teacher is not None and self.guide is not None:
            values |= {name: loss.new_tensor(number) for name, number in self.guide.numbers().items()}
        if config.compat is not None and run is not None:
            # the authors' code divides a short last accumulation window by the full number of batches
            loss = loss * (run.window / run.settings.gradient_accumulation_steps)
        return {"loss": loss, **values}

    def validate(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Compute the metrics of the task, and the distance to `teacher` if it is set, else to the current teacher.

        A `teacher` without a part in training makes the distances of runs with different guides comparable.
        """
        compared = self._compared(model)
        if compared is None:
            return score_batch(model, batch)[0]
        values, outputs = score_batch(model, batch, output_hidden_states=True)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        training = compared.training
        states = compared.eval()(**inputs, output_hidden_states=True).hidden_states
        compared.train(training)
        mask = batch.get("attention_mask")
        distances = layer_distances(outputs.hidden_states, states, None if mask is None else mask.bool(), self.config)
        return {**values, "distance": layer_loss(distances, self.config)}

    def before_update(self, model: nn.Module) -> None:
        """Drop all gradients but those of the compression matrices during the first `freeze_steps` updates."""
        run = self._run
        if self.config.freeze_steps is None or run is None or run.updates >= self.config.freeze_steps:
            return
        for name, parameter in model.named_parameters():
            if GRAFT not in name.split("."):
                parameter.grad = None

    def after_update(self, updates: int) -> None:
        """Advance the teacher during the guided updates."""
        limit = self.config.distill_steps
        if self.guide is not None and (limit is None or updates <= limit):
            self.guide.after_update(updates)

    def state(self) -> Mapping[str, Any]:
        """Return the teacher's part of a checkpoint."""
        return {} if self.guide is None else self.guide.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the teacher's part of a checkpoint."""
        if self.guide is not None:
            self.guide.load_state(state)

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Save the trajectory teacher if `save_teacher` is set."""
        if self.guide is not None:
            self.guide.finish(folder)

    def _compared(self, model: nn.Module) -> nn.Module | None:
        """Dense model whose hidden states validation compares with the student's."""
        if self.config.teacher is None:
            return None if self.guide is None else self.guide.model
        if self._reference_model is None:
            self._reference_model = dense_copy(model).requires_grad_(False).eval()
            weights.load_dense(self._reference_model, weights.weights_file(self.config.teacher))
        return self._reference_model

    def _guided(self, run: TrainingRun | None) -> bool:
        return run is None or self.config.distill_steps is None or run.updates < self.config.distill_steps

    def _check_lengths(self, run: TrainingRun) -> None:
        grafts = [module for module in run.model.modules() if isinstance(module, LinformerAttention)]
        strict = [graft.positions for graft in grafts if graft.on_long == "error"]
        if not strict or run.settings.input_limit <= min(strict):
            return
        longest = max(len(run.dataset[index]["input_ids"]) for index in range(len(run.dataset)))
        if longest > min(strict):
            raise ConfigError(
                f"Found an example of {longest} tokens. Expected at most {min(strict)}, the number of positions of the "
                f"compression. Set max_input_tokens to at most {min(strict)}, convert with more positions, or set "
                "on_long to truncate or interpolate."
            )
