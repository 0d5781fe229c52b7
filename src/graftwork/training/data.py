"""Encoded training data and its collator, by type of model and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftwork.core.example import Examples
from graftwork.core.stored_rows import join_rows
from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.batching import Collator, EncodedDataset
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
) -> tuple[EncodedDataset, Collator]:
    """Encode examples for a model, and return them with their collator.

    Args:
        model: Model that is trained.
        tokenizer: Tokenizer of the model.
        examples: Examples to encode, one entry per task.
        settings: Training settings, of which the maximum lengths are used.
        unlabelled: If True, a model that can neither generate nor classify gets unlabelled texts instead of an error;
            choose it for phases that need no targets.

    Raises:
        ConfigError: If running text is mixed with other tasks, or there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("Found a model without a tokenizer; expected one to encode examples. Pass tokenizer=.")
    rows = join_rows(part.rows for part in examples)
    inner = pretrained(model)
    running = [part.running_text for part in examples]
    if all(running):
        return text_data(rows, model, tokenizer, max_tokens=settings.input_limit)
    if any(running):
        raise ConfigError("Found running text together with other tasks. Train on one kind at a time.")
    if unlabelled and not inner.can_generate() and not is_classifier(inner):
        limit = min(settings.input_limit, positions_of(inner))
        return Sentences(rows, tokenizer, max_tokens=limit), TextBatch(tokenizer, None)
    encoded = encode(
        rows,
        tokenizer,
        model,
        max_input_tokens=settings.input_limit,
        max_target_tokens=settings.target_limit,
    )
    return encoded, PadBatch(padding_id(tokenizer))
