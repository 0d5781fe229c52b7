"""Sequence packing: several examples per row, separated by attention masks, to avoid computation on padding."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
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
"""Batch entries with the segment id of each token [batch tokens]: the packed example, from 1; 0 is padding."""


class PackedExamples(Dataset[dict[str, list[int]]]):
    """Data set of packed rows; the index is the tuple of example indices.

    Args:
        examples: Examples, encoded for an encoder–decoder.
        start: Start token of the decoder.
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
            # every example has its own start token, so that it does not attend to the previous example
            row["decoder_input_ids"] += [self.start, *target[:-1]]
            row[SEGMENTS] += [number] * len(source)
            row[DECODER_SEGMENTS] += [number] * len(target)
        return row


@dataclass(frozen=True)
class PackBatch:
    """Collator of packed rows into tensors [batch tokens]."""

    padding_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad every entry to its longest row [batch tokens]."""
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
    """Raise if packed rows would change the outputs of a model.

    Raises:
        ConfigError: If the model has absolute positions, which would continue from one example to the next.
    """
    family = family_of(model)
    if not family.position_bias:
        raise ConfigError(
            f"packing is on for {type(pretrained(model)).__name__}, whose positions would continue from one example to "
            "the next. Expected a family with relative positions (t5, mt5); switch packing off."
        )


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run one forward pass on a packed or ordinary batch.

    The tokens of a packed example are contiguous, so relative positions are unchanged and packing only needs masks.
    With segment ids s (encoder) and t (decoder), query i attends to key j if

        encoder:         s_i = s_j
        decoder:         t_i = t_j and j ≤ i
        cross-attention: t_i = s_j

    Args:
        model: Model; packed rows need an encoder–decoder with relative positions.
        batch: Batch of a collator; packed if it contains segment ids.
    """
    if SEGMENTS not in batch:
        return model(**batch)
    inputs = {name: value for name, value in batch.items() if name not in (SEGMENTS, DECODER_SEGMENTS)}
    source, target = batch[SEGMENTS], batch[DECODER_SEGMENTS]
    dtype = pretrained(model).dtype
    causal = torch.ones(target.shape[1], target.shape[1], device=target.device).tril().bool()  # [queries keys]
    own = _same(target, target) & causal  # [batch 1 queries keys]
    with _cross_mask(model, _additive(_same(target, source), dtype)):
        return model(
            **inputs,
            attention_mask=_additive(_same(source, source), dtype),
            decoder_attention_mask=_additive(own, dtype),
        )


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    """Mask of equal segment ids [batch 1 queries keys]; padding attends to padding, and those rows are ignored."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]  # [batch queries 1] == [batch 1 keys]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # the smallest finite number instead of −∞ keeps a padded query without any key finite
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


@contextmanager
def _cross_mask(model: nn.Module, mask: Tensor) -> Generator[None]:
    """Replace the decoder's mask over the encoder's tokens, for which transformers passes on the encoder's mask."""

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_attention_mask": mask}

    inner: Any = pretrained(model)
    hook = inner.get_decoder().register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
