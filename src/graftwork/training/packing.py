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
        examples: Encoded examples.
        start: Start token of the decoder of an encoder–decoder; None for a decoder without an encoder.
    """

    def __init__(self, examples: EncodedExamples, start: int | None) -> None:
        self.examples = examples
        self.start = start

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: tuple[int, ...]) -> dict[str, list[int]]:
        return self._causal(indices) if self.start is None else self._pairs(indices, self.start)

    def _causal(self, indices: tuple[int, ...]) -> dict[str, list[int]]:
        """Row of a decoder: its examples one after the other, each with positions from 0."""
        row: dict[str, list[int]] = {name: [] for name in ("input_ids", "labels", "position_ids", SEGMENTS)}
        for number, index in enumerate(indices, start=1):
            example = self.examples[index]
            row["input_ids"] += example["input_ids"]
            # the first token would be predicted from the end of the previous example
            row["labels"] += [IGNORED_LABEL, *example["labels"][1:]]
            row["position_ids"] += range(len(example["input_ids"]))
            row[SEGMENTS] += [number] * len(example["input_ids"])
        return row

    def _pairs(self, indices: tuple[int, ...], start: int) -> dict[str, list[int]]:
        """Row of an encoder–decoder."""
        row: dict[str, list[int]] = {
            name: [] for name in ("input_ids", "labels", "decoder_input_ids", SEGMENTS, DECODER_SEGMENTS)
        }
        for number, index in enumerate(indices, start=1):
            example = self.examples[index]
            source, target = example["input_ids"], example["labels"]
            row["input_ids"] += source
            row["labels"] += target
            # every example has its own start token, so that it does not attend to the previous example
            row["decoder_input_ids"] += [start, *target[:-1]]
            row[SEGMENTS] += [number] * len(source)
            row[DECODER_SEGMENTS] += [number] * len(target)
        return row


@dataclass(frozen=True)
class PackBatch:
    """Collator of packed rows into tensors [batch tokens]."""

    padding_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad every entry to its longest row [batch tokens]."""
        fill = {"labels": IGNORED_LABEL, "position_ids": 0, SEGMENTS: 0, DECODER_SEGMENTS: 0}
        return {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows],
                batch_first=True,
                padding_value=fill.get(name, self.padding_id),
            )
            for name in rows[0]
        }


def check_packing(model: nn.Module, room: int) -> None:
    """Raise if packed rows would change the outputs of a model.

    A decoder without an encoder is tried: the logits of a packed row equal those of its examples.

    Args:
        model: The model.
        room: Number of tokens of a row.

    Raises:
        ConfigError: If the model has absolute positions, which would continue from one example to the next; or if a
            decoder has a sliding window shorter than a row, or other logits in packed rows.
    """
    inner = pretrained(model)
    if not inner.config.is_encoder_decoder and inner.can_generate():
        name = type(inner).__name__
        window = _window(inner.config)
        if window is not None and window < room:
            raise ConfigError(
                f"packing is on for {name} with rows of {room} tokens and a sliding window of {window}, which the "
                "masks of packed rows do not have. Expected shorter rows; lower max_input_tokens, or leave packing out."
            )
        if not _packs_exactly(model):
            raise ConfigError(
                f"packing is on for {name}, whose logits in a packed row differ from those of its examples alone. "
                "Expected a decoder with positions and masks as arguments; switch packing off."
            )
        return
    family = family_of(model)
    if not family.position_bias:
        raise ConfigError(
            f"packing is on for {type(pretrained(model)).__name__}, whose positions would continue from one example to "
            "the next. Expected a family with relative positions (t5, mt5); switch packing off."
        )


def _window(config: Any) -> int | None:
    """Sliding window of a model; None if no layer has one."""
    text = config.get_text_config()
    kinds: Sequence[str] | None = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    unused = getattr(text, "use_sliding_window", True) is False
    if window is None or unused or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


@torch.no_grad()
def _packs_exactly(model: nn.Module) -> bool:
    """True if the logits of two short packed examples are those of each alone."""
    inner: Any = pretrained(model)
    size = int(inner.config.get_text_config().vocab_size)
    rows = [torch.arange(first, first + count, device=inner.device) % size for first, count in ((1, 3), (5, 4))]
    batch = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row), device=inner.device) for row in rows])[None],
        SEGMENTS: torch.cat([torch.full_like(row, number) for number, row in enumerate(rows, start=1)])[None],
    }
    training = model.training
    model.eval()
    try:
        alone: Tensor = torch.cat([model(input_ids=row[None]).logits[0] for row in rows]).float()
        packed: Tensor = forward(model, batch).logits[0].float()
    except (TypeError, ValueError, RuntimeError):
        # models refuse masks and positions in their own ways
        return False
    finally:
        model.train(training)
    limit = 1e-4 if inner.dtype == torch.float32 else 5e-2
    return bool(((packed - alone).abs() <= limit * (1 + alone.abs().max())).all())


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run one forward pass on a packed or ordinary batch.

    The tokens of a packed example are contiguous, so relative positions are unchanged and packing only needs masks.
    With segment ids s (encoder) and t (decoder), query i attends to key j if

        encoder:         s_i = s_j
        decoder:         t_i = t_j and j ≤ i
        cross-attention: t_i = s_j

    A decoder without an encoder has the middle mask with its only segment ids s, and positions from 0 in each example.

    Args:
        model: Model; packed rows need one that `check_packing` accepts.
        batch: Batch of a collator; packed if it contains segment ids.
    """
    if SEGMENTS not in batch:
        return model(**batch)
    inputs = {name: value for name, value in batch.items() if name not in (SEGMENTS, DECODER_SEGMENTS)}
    source = batch[SEGMENTS]
    target = batch.get(DECODER_SEGMENTS, source)
    dtype = pretrained(model).dtype
    causal = torch.ones(target.shape[1], target.shape[1], device=target.device).tril().bool()  # [queries keys]
    own = _same(target, target) & causal  # [batch 1 queries keys]
    if DECODER_SEGMENTS not in batch:
        return model(**inputs, attention_mask=_additive(own, dtype), use_cache=False)
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
