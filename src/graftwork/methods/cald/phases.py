"""The one training phase: the task's own loss, and the distance to whatever teacher the guide provides."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.cald import calibration, weights
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.distances import layer_distances, layer_loss, output_divergence
from graftwork.methods.cald.guides import Guide, dense_copy, make_guide
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import pretrained
from graftwork.training.context import TrainingRun
from graftwork.training.phases import Phase
from graftwork.training.scoring import score_batch

logger = logging.getLogger(__name__)

REFERENCE_WARMUP = 0.04
"""Share of the updates over which the authors' code warms up by default, rounded down."""


class Distill(Phase):
    """Fine-tune a converted model on its task while it follows a teacher.

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
        self._yardstick: nn.Module | None = None

    def prepare(self, model: nn.Module, tokenizer: Any) -> None:
        """Build the teacher, then give the student the weights that it starts from.

        Raises:
            ConfigError: If the model is wrapped by PEFT, whose weights a teacher does not have.
            CheckpointMismatchError: If weights do not fit.
        """
        config = self.config
        self.guide = make_guide(config)
        if model is not pretrained(model) and (self.guide is not None or config.starts_from_target):
            raise ConfigError(
                f"train.lora is on and guide is {config.guide!r}. A guided student is trained as a whole; leave lora "
                "out, or use the guide unguided."
            )
        if self.guide is not None:
            self.guide.prepare(model)
        if config.starts_from_target:
            weights.load_dense(model, weights.weights_file(str(config.teacher)))
        if config.initialization == "svd":
            self._dense = dense_copy(model)

    def begin(self, run: TrainingRun) -> None:
        """Check lengths and clocks, and calibrate what is to be calibrated.

        Raises:
            ConfigError: If examples are longer than the compression has positions.
        """
        self._run = run
        self._check_lengths(run)
        if self._dense is not None and not run.resumed:
            calibration.initialize(run.model, run.place(self._dense), calibration.batches(run.dataset, run.collate))
        self._dense = None
        if self.guide is not None:
            self.guide.begin(run)

    def warmup_steps(self, updates: int) -> int | None:
        """The authors' default, if their ways are asked for."""
        return int(REFERENCE_WARMUP * updates) if self.config.compat else None

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The task's loss, plus weighted distances to the teacher's layers and outputs while there is guidance."""
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
            # a short last window was divided by the full number of batches there
            loss = loss * (run.window / run.settings.gradient_accumulation_steps)
        return {"loss": loss, **values}

    def validate(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The task's numbers, and the distance to the `teacher` of the settings, else to whatever guides now.

        A `teacher` that does not guide is only compared with, so that runs under different guides have one measure.
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
        """Hold everything but the new matrices still for the first updates."""
        run = self._run
        if self.config.freeze_steps is None or run is None or run.updates >= self.config.freeze_steps:
            return
        for name, parameter in model.named_parameters():
            if GRAFT not in name.split("."):
                parameter.grad = None

    def after_update(self, updates: int) -> None:
        """Let the teacher move; not any more once it has been left."""
        limit = self.config.distill_steps
        if self.guide is not None and (limit is None or updates <= limit):
            self.guide.after_update(updates)

    def state(self) -> Mapping[str, Any]:
        """The teacher's part of a checkpoint."""
        return {} if self.guide is None else self.guide.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back the teacher's part of a checkpoint."""
        if self.guide is not None:
            self.guide.load_state(state)

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Write the moving teacher, if it is wanted."""
        if self.guide is not None:
            self.guide.finish(folder)

    def _compared(self, model: nn.Module) -> nn.Module | None:
        """The dense model that the student's layers are compared with on what is held out."""
        if self.config.teacher is None:
            return None if self.guide is None else self.guide.model
        if self._yardstick is None:
            self._yardstick = dense_copy(model).requires_grad_(False).eval()
            weights.load_dense(self._yardstick, weights.weights_file(self.config.teacher))
        return self._yardstick

    def _guided(self, run: TrainingRun | None) -> bool:
        return run is None or self.config.distill_steps is None or run.updates < self.config.distill_steps

    def _check_lengths(self, run: TrainingRun) -> None:
        grafts = [module for module in run.model.modules() if isinstance(module, LinformerAttention)]
        strict = [graft.positions for graft in grafts if graft.on_long == "error"]
        if not strict or run.settings.max_input_tokens <= min(strict):
            return
        longest = max(len(run.dataset[index]["input_ids"]) for index in range(len(run.dataset)))
        if longest > min(strict):
            raise ConfigError(
                f"Found an example of {longest} tokens, but the compression has {min(strict)} positions. Set "
                f"max_input_tokens to at most {min(strict)}, convert with more positions, or set on_long to truncate "
                "or interpolate."
            )
