"""Types of encoded data: rows, batches, data sets and collators; and batches of a given size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from graftwork.surgery.sites import is_classifier, pretrained

Row = Mapping[str, Any]
"""One encoded example: token ids, labels and other columns by name."""

Batch = Mapping[str, Any]
"""Keyword arguments of one forward pass, mostly tensors [batch tokens] by argument name."""

Collator = Callable[[Sequence[Any]], Batch]
"""Makes a batch of encoded rows."""


PASSAGES = 3
"""Number of passages of each row in a batch of a given size, for methods that do not limit it."""


class EncodedDataset(Protocol):
    """Map-style data set of encoded rows, as `torch.utils.data.Dataset` defines it, with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return one row; the type of the index is that of the sampler's items."""
        ...


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Size of a batch without padding."""

    rows: int
    input_tokens: int
    target_tokens: int
    passage_tokens: int = 256
    """Number of tokens of each passage, for methods that read passages."""
    passages: int = PASSAGES
    """Number of passages of each row, for methods that read passages and do not limit it."""


def sample_batch(model: nn.Module, size: BatchSize) -> dict[str, Any]:
    """Return a batch of the given size with arbitrary tokens and labels, on the device of the model.

    A decoder has input and target in one row, an encoder–decoder in two, and a classifier has one label per row.
    """
    inner = pretrained(model)
    config: Any = inner.config
    rows, device = size.rows, inner.device
    tokens = min(size.input_tokens, _positions(config))
    if not config.is_encoder_decoder and not is_classifier(inner) and inner.can_generate():
        tokens = min(size.input_tokens + size.target_tokens, _positions(config))
    input_ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    labels = input_ids.new_zeros(rows) if is_classifier(inner) else input_ids
    if config.is_encoder_decoder:
        labels = input_ids.new_ones(rows, size.target_tokens)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def _positions(config: Any) -> int:
    """Longest input of a model; those of RoBERTa's kind begin to count after the padding token."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    offset = 1 + (config.pad_token_id or 0) if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return int(found) - offset
