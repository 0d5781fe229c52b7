"""Several examples in one row, kept apart by masks, so that no token is computed for padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from graftwork.errors import ConfigError
from graftwork.surgery.sites import family_of, pretrained
from graftwork.training.encoding import IGNORED_LABEL, EncodedExamples

SEGMENTS, DECODER_SEGMENTS = "segment_ids", "decoder_segment_ids"
"""Number of the example that each token belongs to, from 1; 0 for padding."""


class PackedExamples(Dataset[dict[str, list[int]]]):
    """Rows of several examples, by the indices of these.

    Args:
        examples: The examples, encoded for an encoder–decoder.
        start: Token that the decoder starts from.
    """

    def __init__(self, examples: EncodedExamples, start: int) -> None:
        self.examples = examples
        self.start = start

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: tuple[int, ...]) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {
            name: [] for name in ("input_ids", "labels", "decoder_input_ids", SEGMENTS, DECODER_SEGMENTS)
        }
        for number, index in enumerate(indices, start=1):
            example = self.examples[index]
            source, target = example["input_ids"], example["labels"]
            row["input_ids"] += source
            row["labels"] += target
            # each example starts anew: its first token must not see the last one of its neighbour
            row["decoder_input_ids"] += [self.start, *target[:-1]]
            row[SEGMENTS] += [number] * len(source)
            row[DECODER_SEGMENTS] += [number] * len(target)
        return row


@dataclass(frozen=True)
class PackBatch:
    """Collate packed rows into tensors [batch tokens]."""

    padding_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad every entry to its longest row."""
        fill = {"labels": IGNORED_LABEL, SEGMENTS: 0, DECODER_SEGMENTS: 0}
        return {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows],
                batch_first=True,
                padding_value=fill.get(name, self.padding_id),
            )
            for name in rows[0]
        }


def check_packing(model: nn.Module) -> None:
    """Find out whether rows of several examples give a model what single ones do.

    Raises:
        ConfigError: If its positions are absolute, so that they would run on from example to example.
    """
    family = family_of(model)
    if not family.position_bias:
        raise ConfigError(
            f"packing is on for {type(pretrained(model)).__name__}, whose positions would run on from one example to "
            "the next. Expected a family with relative positions (t5, mt5); switch packing off."
        )


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """One forward pass on a batch, packed or not.

    Relative positions within an example are what they are alone, because an example's tokens stand together; so masks
    are all that packing needs.

    Args:
        model: The model; one for packed rows is an encoder–decoder with relative positions.
        batch: What a collator made.
    """
    if SEGMENTS not in batch:
        return model(**batch)
    inputs = {name: value for name, value in batch.items() if name not in (SEGMENTS, DECODER_SEGMENTS)}
    source, target = batch[SEGMENTS], batch[DECODER_SEGMENTS]
    dtype = pretrained(model).dtype
    own = _same(target, target) & torch.ones(target.shape[1], target.shape[1], device=target.device).tril().bool()
    with _cross_mask(model, _additive(_same(target, source), dtype)):
        return model(
            **inputs,
            attention_mask=_additive(_same(source, source), dtype),
            decoder_attention_mask=_additive(own, dtype),
        )


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys belong to the example of a query [batch 1 queries keys]; padding sees padding, and nobody minds."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # a number instead of minus infinity: a padded query without any key stays finite
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


@contextmanager
def _cross_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Give the decoder a mask of its own over the encoder's tokens, where transformers hands on the encoder's."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_attention_mask": mask}

    inner: Any = pretrained(model)
    hook = inner.get_decoder().register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
