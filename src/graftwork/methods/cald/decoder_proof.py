"""Comparison of a decoder with recurrent states in place of its attention, before it is converted."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.surgery import proof
from graftwork.surgery.sites import pretrained

WINDOW = 64
"""Window of the compared mixer, longer than the compared texts, in which it is softmax attention."""
STEPS = 2
"""Number of tokens that are decoded with a cache."""


def observe(model: nn.Module) -> list[Float[Tensor, "rows width"]]:
    """Run a decoder on random tokens with left padding, in one pass and with a cache.

    Args:
        model: The decoder, dense or converted.

    Returns:
        Hidden states [positions width] of the pass, and [rows width] of each token decoded with a cache.

    Raises:
        MismatchError: If the model cannot be run so.
    """
    inner: Any = pretrained(model)
    inputs = proof.sample_inputs(inner)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [rows tokens]
    mask[1, :2] = 0
    found = [proof.outputs(inner, left=True)]
    start, cache = ids.shape[1] - STEPS, None
    with proof.evaluated(inner), torch.no_grad():
        for begin, end in ((0, start), *((at, at + 1) for at in range(start, ids.shape[1]))):
            result = proof.called(
                lambda part, seen=mask[:, :end], cache=cache: inner.base_model(
                    input_ids=part, attention_mask=seen, past_key_values=cache, use_cache=True
                ),
                ids[:, begin:end],
            )
            cache = getattr(result, "past_key_values", None)
            if cache is None:
                raise proof.MismatchError("it returns no cache")
            if begin:
                found.append(result[0][:, -1])
    return found


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    """Compare two results of `observe`, each a list of hidden states [rows width].

    Raises:
        MismatchError: If they differ by more than rounding.
    """
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        proof.compare(one, other, f"{'decoding with a cache' if number else 'a forward pass'} differs")
