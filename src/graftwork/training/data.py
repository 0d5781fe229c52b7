"""Encoded training data and its collator, by kind of model and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftwork.core.example import Examples
from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.encoding import PadBatch, encode, padding_id
from graftwork.training.running_text import Sentences, TextBatch, positions_of, text_data

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def training_data(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[Examples],
    settings: TrainingSettings,
    *,
    unlabelled: bool = False,
) -> tuple[Any, Any]:
    """The examples as a model learns from them, and what makes batches of them.

    Args:
        model: The model that is trained.
        tokenizer: Its tokenizer.
        examples: What to encode.
        settings: How long inputs and targets may be.
        unlabelled: Whether a model that can neither write nor classify gets texts alone, instead of an error.

    Raises:
        ConfigError: If running text is mixed with other tasks.
    """
    rows = [row for part in examples for row in part.rows]
    inner = pretrained(model)
    running = [part.running_text for part in examples]
    if all(running):
        return text_data(rows, model, tokenizer, max_tokens=settings.max_input_tokens)
    if any(running):
        raise ConfigError("Found running text beside other tasks. Train on one kind at a time.")
    if unlabelled and not inner.can_generate() and not is_classifier(inner):
        limit = min(settings.max_input_tokens, positions_of(inner))
        return Sentences(rows, tokenizer, max_tokens=limit), TextBatch(tokenizer, None)
    encoded = encode(
        rows,
        tokenizer,
        model,
        max_input_tokens=settings.max_input_tokens,
        max_target_tokens=settings.max_target_tokens,
    )
    return encoded, PadBatch(padding_id(tokenizer))
