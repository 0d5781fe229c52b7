"""Packed rows of encoded examples, with their collator and sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftwork.core.example import AUXILIARY
from graftwork.core.stored_rows import has_metadata
from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import EncodedExamples, padding_id
from graftwork.training.packing import PackBatch, PackedExamples, check_packing
from graftwork.training.running_text import positions_of
from graftwork.training.sampling import MixtureSchedule, PackedSampler

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def packed_data(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    encoded: EncodedExamples,
    settings: TrainingSettings,
    schedule: MixtureSchedule,
    at_once: int,
) -> tuple[PackedExamples, PackBatch, PackedSampler]:
    """Pack examples: with input and target in rows of their own for an encoder–decoder, in one row for a decoder.

    Args:
        model: Model that is trained.
        tokenizer: Tokenizer of the model.
        encoded: Encoded examples.
        settings: Training settings, of which the maximum lengths are used.
        schedule: Order of the examples.
        at_once: Number of rows of one optimiser step.

    Raises:
        ConfigError: If packed rows would change the outputs of the model, or examples have two prompts.
    """
    if has_metadata(encoded.rows, AUXILIARY):
        raise ConfigError(
            "packing is on, and the examples have two prompts each (explanation_order separate), whose losses are "
            "weighted by themselves. Leave packing out."
        )
    inner: Any = pretrained(model)
    room, start, lengths = (settings.input_limit, settings.target_limit), None, None
    if encoded.encoder_decoder:
        check_packing(model, settings.input_limit)
        start, lengths = int(inner.config.decoder_start_token_id), encoded.lengths()
    else:
        whole = min(settings.input_limit + settings.target_limit + 1, positions_of(inner))
        check_packing(model, whole)
        # one stack has one row, and no second side to fill
        room, lengths = (whole, 1), [[int(count), 0] for count in encoded.input_lengths()]
    sampler = PackedSampler(schedule, lengths, room, at_once)
    return PackedExamples(encoded, start), PackBatch(padding_id(tokenizer)), sampler
