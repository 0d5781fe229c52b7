"""Dropout masks regenerated from a seed per call, never from state on a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from graftwork.metrics.fake_tensors import generator_on


def draw_seed(dropout: float) -> Int[Tensor, ""] | None:
    """Draw the seed of one call from torch's global random state; None if `dropout` is 0.

    Gradient checkpointing restores that state, so its second forward pass draws the same seed.
    """
    return torch.randint(1 << 62, (), dtype=torch.int64, device="cpu") if dropout > 0.0 else None


def keep_mask(
    shape: Sequence[int], dropout: float, seed: int, block: int, device: torch.device
) -> Bool[Tensor, ...] | None:
    """Draw the mask of kept entries of a block, deterministic in seed and block number.

    Args:
        shape: Shape of the block.
        dropout: Rate at which entries are dropped.
        seed: Seed of the call, from `draw_seed`.
        block: Number of the block within the call.
        device: Device of the mask.

    Returns:
        True for kept entries, of shape `shape`; None if `dropout` is 0.
    """
    if dropout == 0.0:
        return None
    generator = generator_on(device, seed + block)
    return torch.empty(tuple(shape), dtype=torch.bool, device=device).bernoulli_(1.0 - dropout, generator=generator)


def precise(device: torch.device) -> torch.autocast:
    """Disable autocast inside a pass, which chooses every dtype explicitly."""
    return torch.autocast(device.type, enabled=False)
