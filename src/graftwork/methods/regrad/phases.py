"""Meta-training: learn an adapter and step sizes, so that one gradient step on a passage teaches the passage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from graftwork.core.files import write_record
from graftwork.errors import ConfigError
from graftwork.methods.regrad.config import PlainLoss, ReGradConfig
from graftwork.methods.regrad.encoding.fingerprint import recorded_step_sizes
from graftwork.methods.regrad.meta_training import learning
from graftwork.methods.regrad.meta_training.chunks import Chunks
from graftwork.methods.regrad.meta_training.episodes import EpisodeCollator, Episodes
from graftwork.methods.regrad.meta_training.selection import Selection
from graftwork.methods.regrad.modules import adapters, flat_adapter, step_sizes
from graftwork.surgery.sites import pretrained
from graftwork.training.batching import Batch, BatchSize, sample_batch
from graftwork.training.context import TrainingRun
from graftwork.training.encoding import EncodedExamples, padding_id
from graftwork.training.phases import ParameterGroup, Phase

if TYPE_CHECKING:
    from graftwork.core.run_folder import RunFolder

SELECTION_FILE = "selection.json"
STEP_SIZES_FILE = "step_sizes.json"


class Meta(Phase):
    """Trains the adapter and its step sizes on questions with passages; all other parameters are frozen.

    Source: ReGrad, outer objective; the authors' training script.
    Differs from it: evaluation questions are a separate set, the first checkpoint is always kept, and a resumed run
    equals an uninterrupted one.

    Args:
        config: Loss, order of the gradients, and selection of checkpoints.
    """

    name: ClassVar[str] = "meta"

    def __init__(self, config: ReGradConfig) -> None:
        self.config = config
        self._chunks = Chunks(config.meta_chunk, config.meta_order)
        self._run: TrainingRun | None = None
        self._selection: Selection | None = None
        self._frozen: list[nn.Parameter] = []
        self._scores: dict[int, float] = {}
        self._best: dict[str, Tensor] = {}

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """Return the adapters and their step sizes, in one group as in the authors' code."""
        learned = [parameter for adapter in adapters(model).values() for parameter in adapter.parameters()]
        return (ParameterGroup(learned),)

    def examples(
        self, model: nn.Module, dataset: object, collate: object, run: RunFolder
    ) -> tuple[Episodes, EpisodeCollator]:
        """Return episodes of questions with passages, and their collator.

        Raises:
            DataError: If no question has a passage.
            ConfigError: If the dataset is packed, or has no questions and answers.
        """
        if not isinstance(dataset, EncodedExamples):
            raise ConfigError("regrad trains on questions with passages. Choose such a task, without packing.")
        lengths = {"max_input_tokens": dataset.max_input_tokens, "max_target_tokens": dataset.max_target_tokens}
        if self.config.select:
            self._selection = Selection(self.config, dataset.tokenizer, **lengths)
        episodes = Episodes(dataset.rows, dataset.tokenizer, self.config, **lengths)
        return episodes, EpisodeCollator(padding_id(dataset.tokenizer))

    def sample_batch(self, model: nn.Module, size: BatchSize) -> Batch:
        """Return questions with passages; every question has `passages` of them."""
        batch = sample_batch(model, size)
        each = self.config.passages or size.passages
        tokens = min(size.passage_tokens, self.config.max_document_tokens)
        documents = batch["input_ids"].new_ones(size.rows * each, tokens)  # [passages tokens]
        return {
            **batch,
            "document_ids": documents,
            "document_mask": torch.ones_like(documents),
            "document_task": torch.arange(size.rows, device=documents.device).repeat_interleave(each),
        }

    def prepare(self, model: nn.Module, tokenizer: object) -> None:
        """Freeze all parameters but those of the adapters.

        Raises:
            ConfigError: If the model is wrapped by PEFT, whose adapter would be trained as well.
        """
        if model is not pretrained(model):
            raise ConfigError("train.lora is on, and regrad has an adapter of its own. Leave lora out.")
        learned = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.parameters()}
        self._frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in learned]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def begin(self, run: TrainingRun) -> None:
        """Validate settings that would make gradients wrong without an error.

        Raises:
            ConfigError: If fp16, a mixture, or dropout with gradient checkpointing is on.
        """
        self._run = run
        settings = run.settings
        if settings.fp16:
            raise ConfigError("fp16 is on; the passages' gradients would underflow. Use bf16, or neither.")
        if settings.mixture is not None:
            raise ConfigError(
                f"Found mixture {settings.mixture!r}. regrad samples all questions equally often; list its tasks."
            )
        dropout = _dropout(run.model)
        if settings.gradient_checkpointing and dropout:
            raise ConfigError(
                f"gradient_checkpointing is on and {dropout}. Gradients of passages are computed without dropout; load "
                "the model with dropout 0, or switch checkpointing off."
            )

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the answers' loss after one step on the passages; with `outer_loss` off, see `plain_losses`."""
        inner = pretrained(model)
        # gradient checkpointing is active in training mode only; `begin` has excluded dropout
        inner.train(self._run is not None and self._run.settings.gradient_checkpointing)
        if not self.config.outer_loss:
            return plain_losses(inner, batch, self.config.plain_loss)
        chunks = self._chunks.of(inner, batch)
        found = learning.meta_gradients(inner, batch, order=self.config.meta_order, chunks=chunks)
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
        """Average gradients over processes; the forward pass bypasses DistributedDataParallel, which would do it."""
        distributed: Any = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= distributed.get_world_size()

    def after_update(self, updates: int) -> None:
        """Score the checkpoint every `select_every` updates and after the last one; keep the best adapter."""
        run = self._run
        if self._selection is None or run is None:
            return
        if updates % self.config.select_every and updates != run.total_updates:
            return
        score = self._selection.score(run.model)
        # the first checkpoint is always kept, so that a run without any score above 0 still has a best one
        if not self._scores or score > max(self._scores.values()):
            self._best = {name: tensor.detach().clone() for name, tensor in _learned(run.model).items()}
        self._scores[updates] = score

    def state(self) -> Mapping[str, Any]:
        """Return scores so far and the best adapter, for the checkpoint."""
        return {"scores": dict(self._scores), "best": self._best} if self._scores else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore scores and the best adapter."""
        self._scores, self._best = dict(state["scores"]), dict(state["best"])

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Load the best adapter; write scores and step sizes to the folder."""
        with torch.no_grad():
            for name, tensor in _learned(model).items():
                if name in self._best:
                    tensor.copy_(self._best[name])
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._run is not None and not self._run.is_main_process:
            return
        write_record(folder / STEP_SIZES_FILE, recorded_step_sizes(model))
        if self._scores:
            best = max(self._scores, key=lambda update: self._scores[update])
            write_record(folder / SELECTION_FILE, {"by": self.config.select_by, "best": best, "scores": self._scores})


def _dropout(model: nn.Module) -> str:
    """Dropout that is active in training mode, as text; empty if there is none."""
    rate = getattr(pretrained(model).config, "attention_dropout", 0.0)
    if rate:
        return f"attention_dropout is {rate}"
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    found = [(name, module.p) for name, module in modules if isinstance(module, nn.Dropout) and module.p]
    return f"{found[0][0]} has dropout {found[0][1]}" if found else ""


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, adapter in adapters(model).items()
        for name, parameter in adapter.named_parameters()
    }


def plain_losses(model: nn.Module, batch: Mapping[str, Any], kind: PlainLoss) -> dict[str, Tensor]:
    """Loss without a gradient step: (L_LM + L_QA) / 2 with kind text_and_answers, or one of the two.

    L_LM is the mean over questions of the mean loss of their passages; L_QA is the mean loss of the answers' tokens
    given their prompts.

    Source: ReGrad, baselines: standard continual pretraining on text, instruction continual pretraining with questions
    mixed in, fine-tuning. The authors' mixing ratio is unknown.

    Returns:
        `loss`; with text_and_answers also `inner_loss` (L_LM) and `answer_loss` (L_QA).
    """
    found: dict[str, Tensor] = {}
    if kind != "answers":
        found["inner_loss"] = _text_loss(model, batch)
    if kind != "text":
        rows = (batch["input_ids"], batch["attention_mask"], batch["labels"])
        found["answer_loss"] = learning.losses_of(model, *rows).mean()
    loss = torch.stack(list(found.values())).mean()  # [1 or 2] -> scalar
    halves = {name: value.detach() for name, value in found.items()}
    return {"loss": loss, **(halves if len(found) > 1 else {})}


def _text_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean over questions of the mean loss of their passages: 1/Q Σ_q 1/|D_q| Σ_{d ∈ D_q} L_LM(d)."""
    losses = learning.losses_of(model, batch["document_ids"], batch["document_mask"])  # [passages]
    owners = batch["document_task"]  # [passages]
    counts = torch.bincount(owners).to(losses)  # [questions]
    return (losses / counts[owners]).sum() / len(counts)
