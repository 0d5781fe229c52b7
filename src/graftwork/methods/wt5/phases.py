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
from graftwork.methods.wt5.grammar import pieces
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import IGNORED_LABEL
from graftwork.training.packing import DECODER_SEGMENTS, forward
from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FinetuneExplanations(Phase):
    """Fine-tuning with separate weights of label and explanation tokens.

    loss = Σ_t w_t · CE_t / Σ_t w_t + z_loss · mean_t (log Z_t)², where Z_t is the denominator of the softmax.

    Source: Narang et al. 2020: the model's cross-entropy; the z-loss is that of the authors' T5 configuration.

    Args:
        explanation_weight: Weight of explanation tokens, including the separator; label tokens have weight 1.
        z_loss: Weight of (log Z)².
    """

    name: ClassVar[str] = "finetune"

    def __init__(self, explanation_weight: float = 1.0, z_loss: float = 0.0) -> None:
        self.explanation_weight = explanation_weight
        self.z_loss = z_loss
        self.separator: tuple[int, ...] = ()

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Tokenize the separator.

        Raises:
            ConfigError: If there is no tokenizer.
        """
        if tokenizer is None:
            raise ConfigError("Found a model without a tokenizer; expected one for the separator. Pass tokenizer=.")
        self.separator = pieces(tokenizer, SEPARATOR.strip(), escape=False)

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Weighted mean of the token losses; `label_loss` and `explanation_loss` are the means of both parts."""
        labels, segments = batch["labels"], batch.get(DECODER_SEGMENTS)
        logits: Tensor = forward(model, batch).logits  # [batch tokens vocabulary]
        if not pretrained(model).config.is_encoder_decoder:
            # a decoder without an encoder predicts each token at the position before it
            logits, labels = logits[:, :-1], labels[:, 1:]
            segments = None if segments is None else segments[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        real = (labels != IGNORED_LABEL).to(logits.dtype)
        # [batch vocabulary tokens] → [batch tokens]
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
        reason = explanation_tokens(labels, self.separator, segments) * real
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


def _mean(values: Tensor, weights: Tensor) -> Tensor | None:
    """Weighted mean; None if all weights are zero."""
    return (values * weights).sum() / weights.sum() if bool(weights.sum() > 0) else None
