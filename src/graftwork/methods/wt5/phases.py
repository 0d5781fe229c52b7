"""Training on labels and reasons, told apart in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftwork.methods.wt5.decoding import pieces
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.training.encoding import IGNORED_LABEL
from graftwork.training.packing import DECODER_SEGMENTS, forward
from graftwork.training.phases import Phase


class FinetuneExplanations(Phase):
    """Fine-tuning whose loss is kept apart for labels and reasons.

    Source: Narang et al. 2020: the model's own loss; the squared log of the softmax's denominator is added as in the
    authors' T5 configuration.

    Args:
        explanation_weight: Weight of a reason's tokens, the separator's included.
        z_loss: Weight of the squared log-denominator.
    """

    name: ClassVar[str] = "finetune"

    def __init__(self, explanation_weight: float = 1.0, z_loss: float = 0.0) -> None:
        self.explanation_weight = explanation_weight
        self.z_loss = z_loss
        self.separator: tuple[int, ...] = ()

    def prepare(self, model: nn.Module, tokenizer: Any) -> None:
        """Learn how the separator is written."""
        self.separator = pieces(tokenizer, SEPARATOR.strip())

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The weighted mean over tokens; `label_loss` and `explanation_loss` are the means of the two parts."""
        labels = batch["labels"]
        logits = forward(model, batch).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        real = (labels != IGNORED_LABEL).to(logits.dtype)
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
        reason = explanation_tokens(labels, self.separator, batch.get(DECODER_SEGMENTS)) * real
        weight = real * torch.where(reason > 0, self.explanation_weight, 1.0)
        loss = (each * weight).sum() / weight.sum()
        if self.z_loss:
            loss = loss + self.z_loss * (logits.logsumexp(-1).square() * real).sum() / real.sum()
        parts = {"label_loss": _mean(each, real - reason), "explanation_loss": _mean(each, reason)}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items() if value is not None}}


def explanation_tokens(labels: Tensor, separator: tuple[int, ...], segments: Tensor | None = None) -> Tensor:
    """Which positions [batch tokens] of targets belong to reasons: all from the first separator to the target's end.

    Args:
        labels: Target tokens.
        separator: Tokens of the separator.
        segments: Number of the example that each position belongs to; None if a row is one example.
    """
    found = torch.ones_like(labels, dtype=torch.bool)
    for shift, piece in enumerate(separator):
        moved = F.pad(labels[:, shift:], (0, shift), value=IGNORED_LABEL)
        found &= moved == piece
    count = found.long().cumsum(1)
    if segments is None:
        return count > 0
    # what was counted before an example began does not belong to it
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    before = torch.where(first, count - found.long(), 0).cummax(1).values
    return count > before


def _mean(values: Tensor, weights: Tensor) -> Tensor | None:
    return (values * weights).sum() / weights.sum() if bool(weights.sum() > 0) else None
