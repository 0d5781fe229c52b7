"""Meta-training: learn where to stand and how far to step, so that one gradient step on a passage teaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftwork.core.files import write_json
from graftwork.errors import ConfigError
from graftwork.methods.regrad.config import PlainLoss, ReGradConfig
from graftwork.methods.regrad.encoding.fingerprint import recorded_step_sizes
from graftwork.methods.regrad.meta_training import learning
from graftwork.methods.regrad.meta_training.episodes import EpisodeCollator, Episodes
from graftwork.methods.regrad.meta_training.selection import Selection
from graftwork.methods.regrad.modules import adapters, flat_adapter, step_sizes
from graftwork.surgery.sites import pretrained
from graftwork.training.context import TrainingRun
from graftwork.training.encoding import EncodedExamples, padding_id
from graftwork.training.phases import ParameterGroup, Phase

SELECTION_FILE = "selection.json"
STEP_SIZES_FILE = "step_sizes.json"


class Meta(Phase):
    """Train the adapter and its step sizes on questions with passages; everything else stays as it is.

    Source: ReGrad, outer objective; the authors' training script.
    Differs from it: evaluation questions are a set of their own, the best score starts below any, and a stopped run
    goes on exactly.

    Args:
        config: What is minimised and by what checkpoints are compared.
    """

    name: ClassVar[str] = "meta"

    def __init__(self, config: ReGradConfig) -> None:
        self.config = config
        self._run: TrainingRun | None = None
        self._selection: Selection | None = None
        self._frozen: list[nn.Parameter] = []
        self._scores: dict[int, float] = {}
        self._best: dict[str, Tensor] = {}

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """The adapters and their step sizes, with one setting for both, as in the original."""
        learned = [parameter for adapter in adapters(model).values() for parameter in adapter.parameters()]
        return (ParameterGroup(learned),)

    def examples(self, model: nn.Module, dataset: Any, collate: Any, run: Any) -> tuple[Any, Any]:
        """Questions with their passages.

        Raises:
            DataError: If no question has a passage.
            ConfigError: If the task is not one of questions and answers.
        """
        if not isinstance(dataset, EncodedExamples):
            raise ConfigError("regrad learns from questions with passages. Train on such a task, without packing.")
        lengths = {"max_input_tokens": dataset.max_input_tokens, "max_target_tokens": dataset.max_target_tokens}
        if self.config.select:
            self._selection = Selection(self.config, dataset.tokenizer, **lengths)
        episodes = Episodes(dataset.rows, dataset.tokenizer, self.config, **lengths)
        return episodes, EpisodeCollator(padding_id(dataset.tokenizer))

    def prepare(self, model: nn.Module, tokenizer: Any) -> None:
        """Hold everything but the adapters still.

        Raises:
            ConfigError: If the model is wrapped by PEFT, whose own adapter would be trained beside ours.
        """
        if model is not pretrained(model):
            raise ConfigError("train.lora is on, and regrad has an adapter of its own. Leave lora out.")
        learned = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.parameters()}
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in learned]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def begin(self, run: TrainingRun) -> None:
        """Refuse what would spoil the gradients in silence.

        Raises:
            ConfigError: If a setting of the training does not go with it.
        """
        self._run = run
        settings, config = run.settings, pretrained(run.model).config
        if settings.fp16:
            raise ConfigError("fp16 is on; the passages' gradients would underflow. Use bf16, or neither.")
        if settings.mixture is not None:
            raise ConfigError(
                f"Found mixture {settings.mixture!r}. regrad passes over all questions equally often; list its tasks."
            )
        dropout = getattr(config, "attention_dropout", 0.0)
        if settings.gradient_checkpointing and dropout:
            raise ConfigError(
                f"gradient_checkpointing is on and attention_dropout is {dropout}. A passage's gradient is taken "
                "without dropout; load the model with attention_dropout 0."
            )

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The answers' loss after a step on the passages; or, without an outer loss, what is learned without a step."""
        inner = pretrained(model)
        # layers are computed again in training mode only; there is no dropout in it, as `begin` has seen to
        inner.train(self._run is not None and self._run.settings.gradient_checkpointing)
        if not self.config.outer_loss:
            return plain_losses(inner, batch, self.config.plain_loss)
        found = learning.meta_gradients(inner, batch, order=self.config.meta_order)
        sizes = step_sizes(inner)
        loss = learning.with_gradients(found.loss, (flat_adapter(inner), found.adapter), (sizes, found.step_sizes))
        return {
            "loss": loss,
            "inner_loss": found.inner_loss,
            "gradient_norm": found.gradient_norm,
            "update_ratio": found.update_ratio,
            "negative_step_sizes": (sizes < 0).float().mean(),
        }

    def before_update(self, model: nn.Module) -> None:
        """Average gradients over processes; they are made apart from the wrapper that would do it."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= distributed.get_world_size()

    def after_update(self, updates: int) -> None:
        """Compare this checkpoint with the best so far, at every so manieth update and at the last."""
        run = self._run
        if self._selection is None or run is None:
            return
        if updates % self.config.select_every and updates != run.total_updates:
            return
        score = self._selection.score(run.model)
        # the first one is kept whatever it scores
        if not self._scores or score > max(self._scores.values()):
            self._best = {name: tensor.detach().clone() for name, tensor in _learned(run.model).items()}
        self._scores[updates] = score

    def state(self) -> Mapping[str, Any]:
        """Scores so far, and the best adapter."""
        return {"scores": dict(self._scores), "best": self._best} if self._scores else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back scores and the best adapter."""
        self._scores, self._best = dict(state["scores"]), dict(state["best"])

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Go back to the best adapter, and write scores and step sizes down."""
        with torch.no_grad():
            for name, tensor in _learned(model).items():
                if name in self._best:
                    tensor.copy_(self._best[name])
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._run is not None and not self._run.is_main_process:
            return
        write_json(folder / STEP_SIZES_FILE, recorded_step_sizes(model))
        if self._scores:
            best = max(self._scores, key=lambda update: self._scores[update])
            write_json(folder / SELECTION_FILE, {"by": self.config.select_by, "best": best, "scores": self._scores})


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, adapter in adapters(model).items()
        for name, parameter in adapter.named_parameters()
    }


def plain_losses(model: nn.Module, batch: Mapping[str, Any], kind: PlainLoss) -> dict[str, Tensor]:
    """What is learned without any step: the mean of the passages' loss and that of the answers, or one of them.

    An answer's loss is that of its tokens alone; the prompt is not learned.

    Source: ReGrad, baselines: standard continual pretraining on text, instruction continual pretraining with questions
    mixed in, fine-tuning. How the authors mix is not known to us.

    Returns:
        `loss`; with both also its halves, `inner_loss` of the passages and `answer_loss`.
    """
    found = {}
    if kind != "answers":
        found["inner_loss"] = _text_loss(model, batch)
    if kind != "text":
        rows = (batch["input_ids"], batch["attention_mask"], batch["labels"])
        found["answer_loss"] = learning.losses_of(model, *rows).mean()
    loss = torch.stack(list(found.values())).mean()
    halves = {name: value.detach() for name, value in found.items()}
    return {"loss": loss, **(halves if len(found) > 1 else {})}


def _text_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The mean over questions of the mean loss of their passages."""
    losses = learning.losses_of(model, batch["document_ids"], batch["document_mask"])
    owners = batch["document_task"]
    counts = torch.bincount(owners).to(losses)
    return (losses / counts[owners]).sum() / len(counts)
