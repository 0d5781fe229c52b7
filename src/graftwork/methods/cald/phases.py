"""Training phases of CALD: attention transfer, and the task loss plus distances to the teacher of the guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.cald import calibration, weights
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.distances import layer_distances, layer_loss, output_divergence
from graftwork.methods.cald.guides import Guide, dense_copy, has_no_values, make_guide
from graftwork.methods.cald.modules import FeatureMapAttention, LinformerAttention
from graftwork.methods.cald.recurrence import LinearAttention, transferring
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.attention import seam_modules
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import attention_sites, pretrained
from graftwork.training.context import TrainingRun
from graftwork.training.phases import ParameterGroup, Phase
from graftwork.training.running_text import positions_of
from graftwork.training.samples import batches
from graftwork.training.scoring import score_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_WARMUP = 0.04
"""Share of the updates in the default warm-up of the authors' code, rounded down."""


class AttentionTransfer(Phase):
    """Training of the mixers alone, on the dense attention outputs of their own layers.

    Every converted layer receives the hidden states of the dense model, computes dense attention and its mixer on them,
    and passes the dense output on. loss = mean over layers of ‖y − ŷ‖² / ‖y‖² over all real tokens, with the outputs y
    of dense attention and ŷ of the mixer before the output projection.

    Source: Zhang et al. 2025, LoLCATs, section 3.2, attention transfer.
    Differs from it: the error of a layer is relative, so that all layers have the same weight.

    Args:
        config: Number of updates and learning rate.
    """

    name: ClassVar[str] = "transfer"
    needs_labels: ClassVar[bool] = False

    def __init__(self, config: CaldConfig) -> None:
        self.config = config
        self._trainable: dict[str, bool] = {}
        self._model: nn.Module | None = None

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """Replace number of updates and learning rate; no weight decay, and no choice of a best checkpoint."""
        return replace(
            settings,
            max_steps=self.config.transfer_steps or 0,
            learning_rate=self.config.transfer_learning_rate,
            weight_decay=0.0,
            load_best_model_at_end=False,
            early_stopping=None,
        )

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """Parameters of the mixers."""
        return (ParameterGroup([each for graft in _mixers(model) for each in graft.parameters()]),)

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Freeze everything but the mixers, also those that PEFT has frozen."""
        self._model = model
        self._trainable = freeze(model, "mixer")

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Run the dense model, and return the relative errors of the mixers: their mean, and one number per layer."""
        with transferring(model) as errors:
            model(**{name: value for name, value in batch.items() if name != "labels"})
            values = torch.stack(errors)  # [layers]
        return {"loss": values.mean(), **{f"layer_{number}": each.detach() for number, each in enumerate(values)}}

    def validate(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Relative errors of one validation batch."""
        return self.step(model, batch)

    def state(self) -> Mapping[str, Any]:
        """Parameters of the mixers of a model wrapped by PEFT, whose checkpoints contain the adapter only."""
        if self._model is None or self._model is pretrained(self._model):
            return {}
        return {"mixers": [{n: t.cpu() for n, t in each.state_dict().items()} for each in _mixers(self._model)]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the parameters of the mixers."""
        if self._model is not None:
            for graft, saved in zip(_mixers(self._model), state.get("mixers", ()), strict=False):
                graft.load_state_dict(saved)

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Make the parameters trainable again that were so before."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))


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
        self._trainable: dict[str, bool] = {}

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Create the teacher, then load the student's initial weights.

        Raises:
            ConfigError: If the model is wrapped by PEFT, so that its weights have other names than the teacher's.
            CheckpointMismatchError: If names or shapes of weights differ.
        """
        config = self.config
        self.guide = make_guide(config)
        wrapped = model is not pretrained(model)
        if wrapped and config.guide == "trajectory":
            raise ConfigError(
                "train.lora is on and guide is 'trajectory'. Expected full fine-tuning, because the teacher is trained "
                "as the student is. Omit lora, or choose another guide."
            )
        if wrapped and config.trained != "all":
            raise ConfigError(
                f"train.lora is on and trained is {config.trained!r}. An adapter selects the trained modules. Omit "
                "trained, and set target_modules of lora."
            )
        if self.guide is not None:
            self.guide.prepare(model)
        if config.starts_from_target and not has_no_values(model):
            weights.load_dense(model, weights.weights_file(str(config.teacher)), config.extend_positions)
        if config.effective_initialization == "svd":
            self._dense = dense_copy(model)
        if config.trained != "all":
            self._trainable = freeze(model, config.trained)

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
        steps = self.config.replacement_steps
        if steps is not None and steps > run.total_updates:
            raise ConfigError(
                f"replacement_steps is {steps}, and the training has {run.total_updates} updates. Expected at most "
                "that number, so that every layer is replaced at its end. Reduce it, or train longer."
            )
        self._replace(run.updates)

    def warmup_steps(self, updates: int) -> int | None:
        """Return the authors' default of 4 % with `compat`, else None."""
        return int(REFERENCE_WARMUP * updates) if self.config.compat else None

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Compute the task loss, plus the weighted distances to the teacher during the guided updates."""
        config, run = self.config, self._run
        teacher = None
        if self.guide is not None and self._guided(run):
            teacher = self.guide.outputs(batch)
        compares_layers = teacher is not None and config.effective_layer_weight > 0
        outputs = model(**batch, output_hidden_states=compares_layers)
        loss, values = outputs.loss, {"ce": outputs.loss.detach()}
        if teacher is not None and config.effective_layer_weight > 0:
            mask = batch.get("attention_mask")
            distances = layer_distances(
                outputs.hidden_states, teacher.hidden_states, None if mask is None else mask.bool(), config
            )
            layer = layer_loss(distances, config)
            loss = loss + config.effective_layer_weight * layer
            values |= {"layer": layer.detach(), **{f"layer_{i}": d.detach() for i, d in distances.items()}}
        if teacher is not None and config.effective_output_weight > 0:
            chosen = predicted(batch, outputs.logits)
            divergence = output_divergence(outputs.logits[chosen], teacher.logits[chosen], config)
            loss = loss + config.effective_output_weight * divergence
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
        """Replace the next layers, and advance the teacher during the guided updates."""
        self._replace(updates)
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
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))

    def _replace(self, updates: int) -> None:
        """Replace the layers whose turn has come: layer i of n after i/n of `replacement_steps` updates."""
        steps, run = self.config.replacement_steps, self._run
        if steps is None or run is None:
            return
        kinds = (LinformerAttention, FeatureMapAttention, LinearAttention)
        grafts = [graft for graft in seam_modules(run.model).values() if isinstance(graft, kinds)]
        for number, graft in enumerate(grafts):
            graft.replaced = updates * len(grafts) >= number * steps

    def _compared(self, model: nn.Module) -> nn.Module | None:
        """Dense model whose hidden states validation compares with the student's."""
        if self.config.teacher is None:
            return None if self.guide is None else self.guide.model
        if self._reference_model is None:
            self._reference_model = dense_copy(model).requires_grad_(False).eval()
            file = weights.weights_file(self.config.teacher)
            weights.load_dense(self._reference_model, file, self.config.extend_positions)
        return self._reference_model

    def _guided(self, run: TrainingRun | None) -> bool:
        return run is None or self.config.distill_steps is None or run.updates < self.config.distill_steps

    def _check_lengths(self, run: TrainingRun) -> None:
        grafts = [module for module in run.model.modules() if isinstance(module, LinformerAttention)]
        strict = [graft.positions for graft in grafts if graft.on_long == "error"]
        # RoBERTa has more rows than positions
        limit = min([*strict, positions_of(pretrained(run.model))]) if strict else 0
        if not strict or run.settings.input_limit <= limit:
            return
        longest = max(len(run.dataset[index]["input_ids"]) for index in range(len(run.dataset)))
        if longest > limit:
            raise ConfigError(
                f"Found an example of {longest} tokens. Expected at most {limit}, the number of positions of the "
                f"compression and of the model. Set max_input_tokens to at most {limit}, convert with more positions "
                "if the model has them, or set on_long to truncate or interpolate."
            )


def freeze(model: nn.Module, trained: str) -> dict[str, bool]:
    """Freeze all parameters but those of a part of a converted model.

    Args:
        model: Converted model.
        trained: Part that stays trainable: "mixer" or "attention".

    Returns:
        Name of each parameter to whether it was trainable before.
    """
    inside = [site.path for site in attention_sites(model)] if trained == "attention" else []
    before: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        before[name] = parameter.requires_grad
        own = GRAFT in name.split(".") or name.startswith(tuple(f"{path}." for path in inside))
        parameter.requires_grad_(own)
    return before


def predicted(batch: Mapping[str, Any], logits: Tensor) -> Any:
    """Index of the rows of `logits` whose divergence counts: all of a classifier, real tokens of a language model.

    Args:
        batch: Inputs of the model.
        logits: Outputs of the model [batch classes] or [batch tokens classes].
    """
    mask = batch.get("attention_mask")
    return slice(None) if logits.ndim == 2 or mask is None else mask.bool()


def _mixers(model: nn.Module) -> list[LinearAttention]:
    return [graft for graft in seam_modules(model).values() if isinstance(graft, LinearAttention)]
