"""Dropout whose mask belongs to one call: it is made from a seed that the call keeps, never from state on a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def draw_seed(dropout: float) -> Int[Tensor, ""] | None:
    """Draw the seed of one call from torch's random state; None if nothing is dropped.

    Gradient checkpointing restores that state, so its second forward pass draws the same seed.
    """
    return torch.randint(1 << 62, (), dtype=torch.int64, device="cpu") if dropout > 0.0 else None


def keep_mask(
    shape: Sequence[int], dropout: float, seed: int, block: int, device: torch.device
) -> Bool[Tensor, ...] | None:
    """Say which entries of a block survive; the same answer for the same seed and block. None if nothing is dropped."""
    if dropout == 0.0:
        return None
    generator = torch.Generator(device).manual_seed(seed + block)
    return torch.empty(tuple(shape), dtype=torch.bool, device=device).bernoulli_(1.0 - dropout, generator=generator)


def precise(device: torch.device) -> torch.autocast:
    """Switch autocast off inside a pass, where every type is chosen by hand."""
    return torch.autocast(device.type, enabled=False)
