"""Training phase with separate losses of labels and explanations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.methods.wt5.orders import LABEL_MARK
from graftwork.methods.wt5.spelling import pieces
from graftwork.surgery.sites import pretrained
from graftwork.training.batching import Batch, BatchSize
from graftwork.training.encoding import IGNORED_LABEL, SECOND
from graftwork.training.packing import DECODER_SEGMENTS, SEGMENTS, forward
from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FinetuneExplanations(Phase):
    """Fine-tuning with separate weights of label and explanation tokens.

    loss = Σ_t w_t · CE_t / Σ_t w_t + z_loss · mean_t (log Z_t)², where Z_t is the denominator of the softmax.

    Examples with two prompts have one such loss for each of them, means over the tokens of all targets of a batch:

    loss = alpha · loss of the labels + (1 − alpha) · loss of the explanations

    Source: Narang et al. 2020: the model's cross-entropy; the z-loss is that of the authors' T5 configuration. Hsieh et
    al. 2023, "Distilling Step-by-Step!": the two losses (`TaskPrefixTrainer` of
    `google-research/distilling-step-by-step`).
    Differs from the latter: an example without an explanation has a label loss only.

    Args:
        explanation_weight: Weight of explanation tokens, including separator and mark; label tokens have weight 1.
        z_loss: Weight of (log Z)².
        reason_first: True if explanations precede the label.
        alpha: Weight of the label loss of examples with two prompts; None if examples have one.
    """

    name: ClassVar[str] = "finetune"

    def __init__(
        self,
        explanation_weight: float = 1.0,
        z_loss: float = 0.0,
        *,
        reason_first: bool = False,
        alpha: float | None = None,
    ) -> None:
        self.explanation_weight = explanation_weight
        self.z_loss = z_loss
        self.reason_first = reason_first
        self.alpha = alpha
        self.separator: tuple[int, ...] = ()

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Tokenize the separator.

        Raises:
            ConfigError: If there is no tokenizer.
        """
        if tokenizer is None:
            raise ConfigError("Found a model without a tokenizer; expected one for the separator. Pass tokenizer=.")
        self.separator = pieces(tokenizer, LABEL_MARK if self.reason_first else SEPARATOR.strip(), escape=False)

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Weighted mean of the token losses; `label_loss` and `explanation_loss` are the means of both parts."""
        second = {name.removeprefix(SECOND): value for name, value in batch.items() if name.startswith(SECOND)}
        if not second:
            return self._losses(model, batch)
        own = self._losses(model, {name: value for name, value in batch.items() if not name.startswith(SECOND)})
        reason = self._losses(model, second)["loss"]
        alpha = 0.5 if self.alpha is None else self.alpha
        loss = alpha * own["loss"] + (1 - alpha) * reason
        return {"loss": loss, "label_loss": own["loss"].detach(), "explanation_loss": reason.detach()}

    def sample_batch(self, model: nn.Module, size: BatchSize) -> Batch:
        """Return a batch with arbitrary values, with both prompts if examples have two."""
        batch = super().sample_batch(model, size)
        return batch if self.alpha is None else {**batch, **{SECOND + name: value for name, value in batch.items()}}

    def validate(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the model's loss; examples with two prompts have the loss of the training."""
        if any(name.startswith(SECOND) for name in batch):
            return {"loss": self.step(model, batch)["loss"]}
        return super().validate(model, batch)

    def _losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Losses of one prompt of each example."""
        labels, segments = batch["labels"], batch.get(DECODER_SEGMENTS, batch.get(SEGMENTS))
        logits: Tensor = forward(model, batch).logits  # [batch tokens vocabulary]
        if not pretrained(model).config.is_encoder_decoder:
            # a decoder without an encoder predicts each token at the position before it
            logits, labels = logits[:, :-1], labels[:, 1:]
            segments = None if segments is None else segments[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        real = (labels != IGNORED_LABEL).to(logits.dtype)
        # [batch vocabulary tokens] → [batch tokens]
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
        marked = tokens_before if self.reason_first else explanation_tokens
        reason = marked(labels, self.separator, segments) * real
        weight = real * torch.where(reason > 0, self.explanation_weight, 1.0)
        loss = (each * weight).sum() / weight.sum()
        if self.z_loss:
            loss = loss + self.z_loss * (logits.logsumexp(-1).square() * real).sum() / real.sum()
        parts = {"label_loss": _mean(each, real - reason), "explanation_loss": _mean(each, reason)}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items() if value is not None}}


def explanation_tokens(
    labels: Int[Tensor, "batch tokens"],
    separator: tuple[int, ...],
    segments: Int[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """True for target positions in explanations, from the first separator to the end of the target.

    Args:
        labels: Target tokens.
        separator: Tokens of the separator.
        segments: Index of the packed example of each position; None if a row is one example.
    """
    found = torch.ones_like(labels, dtype=torch.bool)
    for shift, piece in enumerate(separator):
        moved = F.pad(labels[:, shift:], (0, shift), value=IGNORED_LABEL)  # [batch tokens]
        found &= moved == piece
    count = found.long().cumsum(1)
    if segments is None:
        return count > 0
    # separators of earlier examples in the row do not count
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    before = torch.where(first, count - found.long(), 0).cummax(1).values
    return count > before


def tokens_before(
    labels: Int[Tensor, "batch tokens"],
    mark: tuple[int, ...],
    segments: Int[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """True for target positions up to the last mark, including it: the explanations that precede a label.

    Args:
        labels: Target tokens.
        mark: Tokens of the mark.
        segments: Index of the packed example of each position; None if a row is one example.
    """
    # read from the end, the explanations follow the mark
    backwards = None if segments is None else segments.flip(1)
    return explanation_tokens(labels.flip(1), mark[::-1], backwards).flip(1)


def _mean(values: Tensor, weights: Tensor) -> Tensor | None:
    """Weighted mean; None if all weights are zero."""
    return (values * weights).sum() / weights.sum() if bool(weights.sum() > 0) else None
