"""Batches of the first examples, for calibration before a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import EncodedExamples, PadBatch, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example

SAMPLE = 64
"""Default number of examples of a sample."""
BATCH = 16
"""Batch size of the forward passes on a sample."""
MOST_TOKENS = 512
"""Maximum length of inputs and targets of a sample."""


def batches(
    dataset: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]],
    count: int = SAMPLE,
    *,
    labels: bool = False,
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the first `count` examples of a data set in batches.

    Args:
        dataset: Encoded examples.
        collate: Collator.
        count: Maximum number of examples.
        labels: Keep the labels, from which encoder–decoders derive the inputs of their decoder.
    """
    rows = [dataset[index] for index in range(min(count, len(dataset)))]
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH])
        yield {name: value for name, value in batch.items() if labels or name != "labels"}


def sample_batches(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the first `SAMPLE` examples as model inputs, on the device of the model.

    Args:
        model: Model that is called.
        tokenizer: Its tokenizer.
        rows: Examples; inputs alone reach encoders and decoders, inputs and targets encoder–decoders.
    """
    inner: Any = pretrained(model)
    both = bool(inner.config.is_encoder_decoder)
    if both:
        data: Any = EncodedExamples(
            rows, tokenizer, encoder_decoder=True, max_input_tokens=MOST_TOKENS, max_target_tokens=MOST_TOKENS
        )
    else:
        limit = min(MOST_TOKENS, int(getattr(inner.config, "max_position_embeddings", None) or MOST_TOKENS))
        encode: Any = tokenizer
        data = [encode(row.input, row.pair, truncation=True, max_length=limit) for row in rows[:SAMPLE]]
    for batch in batches(data, PadBatch(padding_id(tokenizer)), labels=both):
        yield {name: value.to(inner.device) for name, value in batch.items()}
