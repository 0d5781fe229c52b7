"""Memory of inference: a real forward pass, or prefill and one decoding step with a full cache, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.grafting.capabilities import StoresPassages
from graftwork.grafting.converted import Converted
from graftwork.metrics.memory import MemoryRecorder, bytes_of
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.batching import BatchSize, sample_batch


@dataclass(frozen=True, slots=True)
class InferenceMemory:
    """Bytes of inference, over all devices."""

    weights: int
    cache: int
    """Keys and values of the whole prompt and answer; 0 without generation."""
    peak: int


@torch.no_grad()
def measure_inference(converted: Converted, size: BatchSize, recorder: MemoryRecorder) -> InferenceMemory:
    """Run inference on one batch and return its memory.

    Args:
        converted: Model with its methods, with or without values.
        size: Number of rows, of input tokens and of generated tokens.
        recorder: Recorder that has seen the model being built.
    """
    model = converted.model.eval()
    inner: Any = pretrained(model)
    weights = bytes_of([*model.parameters(), *model.buffers()])
    batch = {name: value for name, value in sample_batch(model, size).items() if name != "labels"}
    cache = 0
    with ExitStack() as stack:
        for method in converted.methods:
            if isinstance(method, StoresPassages):
                stack.enter_context(method.applied(model, size.rows))
        recorder.reset_peak()
        if is_classifier(inner) or not inner.can_generate():
            model(**batch)
        else:
            both = bool(inner.config.is_encoder_decoder)
            if not both:
                batch = {name: value[:, : size.input_tokens] for name, value in batch.items()}
            cache = _generate(model, batch, size, both)
    return InferenceMemory(weights, cache, recorder.peak_bytes)


def _generate(model: Any, batch: dict[str, Tensor], size: BatchSize, both: bool) -> int:
    """Generate two tokens; then lengthen the cache to the last token and decode it. Return the bytes of the cache."""
    inner: Any = pretrained(model)
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
    with suppress(_EnoughError):
        inner.generate(**batch, **options, max_new_tokens=3, stopping_criteria=[_after_two(batch, both)])
    if both:
        start = batch["input_ids"].new_ones(size.rows, 1)
        outputs = model(**batch, decoder_input_ids=start, use_cache=True)
    else:
        outputs = model(**batch, use_cache=True, logits_to_keep=1)
    cache: Any = outputs.past_key_values
    del outputs
    grown: Any = cache.self_attention_cache if both else cache
    added = max(0, size.target_tokens - 2)
    for number, layer in enumerate(grown.layers):
        if added and layer.keys is not None:
            shape = (*layer.keys.shape[:2], added, layer.keys.shape[-1])
            grown.update(layer.keys.new_empty(shape), layer.values.new_empty(shape), number)
    rows = size.rows
    last = batch["input_ids"].new_ones(rows, 1)
    if both:
        encoded = inner.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        model(
            encoder_outputs=encoded,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=last,
            past_key_values=cache,
            use_cache=True,
        )
    else:
        mask = last.new_ones(rows, grown.get_seq_length() + 1)
        model(input_ids=last, attention_mask=mask, past_key_values=cache, use_cache=True)
    return bytes_of(list(_cached(cache, both)))


class _EnoughError(Exception):
    """Enough tokens have been generated."""


def _after_two(batch: dict[str, Tensor], both: bool) -> Any:
    """Stopping criterion that raises after two tokens; values of tensors, which may be absent, cannot end it."""
    enough = 3 if both else batch["input_ids"].shape[1] + 2

    def stop(input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if input_ids.shape[1] >= enough:
            raise _EnoughError
        return input_ids.new_zeros(len(input_ids), dtype=torch.bool)

    return stop


def _cached(cache: Any, both: bool) -> Iterator[Tensor]:
    """Tensors of a cache."""
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if both else (cache,):
        for layer in part.layers:
            if layer.keys is not None:
                yield layer.keys
                yield layer.values
