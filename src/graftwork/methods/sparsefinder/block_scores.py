"""Estimators of the attention of a query to blocks of keys: mean-pooled keys, bounds of a block, and a learned gate.

Sources: the mean of the keys of a block as in MoBA (Lu et al. 2025); the bounds of a block, or page, as in Quest (Tang
et al. 2024); a gate on pooled keys, distilled on the attention of blocks, as in SeerAttention (Gao et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.sparsefinder.tensors import unflatten
from graftwork.surgery.precision import attention_scores, compute_dtype


@dataclass(frozen=True, slots=True, eq=False)
class PooledKeys:
    """Keys of every block, pooled over its non-padding tokens; zeros for a block without one."""

    mean: Float[Tensor, "batch groups blocks width"]
    high: Float[Tensor, "batch groups blocks width"]
    """Largest value of every coordinate."""
    low: Float[Tensor, "batch groups blocks width"]
    """Smallest value of every coordinate."""
    real: Bool[Tensor, "batch blocks"]
    """True for blocks with a non-padding token."""

    @property
    def joined(self) -> Float[Tensor, "batch groups blocks joined"]:
        """Mean, largest and smallest values of every block together, joined = 3 · width."""
        return torch.cat([self.mean, self.high, self.low], dim=-1)


def pool_keys(
    key: Float[Tensor, "batch groups keys width"],
    real: Bool[Tensor, "batch keys"],
    unit: int,
    start: Int[Tensor, " batch"] | None = None,
) -> PooledKeys:
    """Pool the keys of blocks of `unit` tokens, in at least float32.

    Args:
        key: Keys.
        real: True for keys that are not padding.
        unit: Tokens per block.
        start: Index of the first key of block 0 in each sequence, under left padding; None for 0.
    """
    if start is not None:
        key, real = _shifted(key, real, start)
    missing = -key.shape[2] % unit
    flags = unflatten(F.pad(real, (0, missing)), 1, (-1, unit))  # [batch blocks unit]
    blocks = unflatten(F.pad(key, (0, 0, 0, missing)), 2, (-1, unit)).to(compute_dtype(key.dtype))
    inside = flags[:, None, :, :, None]  # [batch 1 blocks unit 1]
    some = flags.any(-1)  # [batch blocks]
    count = flags.sum(-1).clamp_min(1)[:, None, :, None]  # [batch 1 blocks 1]
    missing_block = ~some[:, None, :, None]  # [batch 1 blocks 1]
    # [batch groups blocks unit width] → [batch groups blocks width]
    mean = blocks.masked_fill(~inside, 0.0).sum(3) / count
    high = blocks.masked_fill(~inside, -torch.inf).amax(3).masked_fill(missing_block, 0.0)
    low = blocks.masked_fill(~inside, torch.inf).amin(3).masked_fill(missing_block, 0.0)
    return PooledKeys(mean, high, low, some)


def pool_queries(
    query: Float[Tensor, "batch heads queries width"], real: Bool[Tensor, "batch queries"], unit: int
) -> Float[Tensor, "batch heads blocks width"]:
    """Mean query of every block of `unit` tokens over its non-padding tokens."""
    return pool_keys(query, real, unit).mean


def mean_scores(
    query: Float[Tensor, "batch heads rows width"], pooled: PooledKeys
) -> Float[Tensor, "batch heads rows blocks"]:
    """Q · mean of the keys of a block, the mean score of the query in the block."""
    return attention_scores(query.to(pooled.mean.dtype), pooled.mean, 1.0)


def page_scores(
    query: Float[Tensor, "batch heads rows width"], pooled: PooledKeys
) -> Float[Tensor, "batch heads rows blocks"]:
    """Upper bound of q·k in a block: Σ_d max(q_d · high_d, q_d · low_d) = q₊ · high + q₋ · low."""
    wide = query.to(pooled.mean.dtype)
    return attention_scores(wide.clamp_min(0.0), pooled.high, 1.0) + attention_scores(
        wide.clamp_max(0.0), pooled.low, 1.0
    )


def gate_scores(
    query: Float[Tensor, "batch heads rows rounds"], key: Float[Tensor, "batch heads blocks rounds"]
) -> Float[Tensor, "batch heads rows blocks"]:
    """Logits of the gate: projected query · projected block / √rounds."""
    return attention_scores(query, key, query.shape[-1] ** -0.5)


def gate_loss(
    logits: Float[Tensor, "batch heads rows blocks"],
    mass: Float[Tensor, "batch heads rows blocks"],
    candidate: Bool[Tensor, "batch 1 rows blocks"],
) -> Float[Tensor, ""]:
    """Kullback–Leibler divergence of the softmax of the gate's logits from the attention mass of candidate blocks.

    Rows without mass in candidates, or with a single candidate, do not count.

    Args:
        logits: Logits of the gate.
        mass: Attention mass of every block.
        candidate: True for blocks that the gate may choose from: not the own block, not padding, not in the future.
    """
    target = mass.masked_fill(~candidate, 0.0)
    total = target.sum(-1, keepdim=True)  # [batch heads rows 1]
    counted = (total[..., 0] > 0) & (candidate.sum(-1) > 1)  # [batch heads rows]
    share = target / total.masked_fill(total == 0, 1.0)
    # rows without a candidate would be NaN, in the gradient too
    logits = logits.masked_fill(~candidate, torch.finfo(logits.dtype).min)
    terms = torch.xlogy(share, share) - share * F.log_softmax(logits, dim=-1)
    rows = terms.masked_fill(~candidate, 0.0).sum(-1)  # [batch heads rows]
    return (rows * counted).sum() / counted.sum().clamp_min(1)


def _shifted(key: Tensor, real: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and flags with the first key of block 0 at index 0; what follows the last key is padding."""
    index = torch.arange(key.shape[2], device=key.device) + start.to(key.device)[:, None]  # [batch keys]
    inside = index < key.shape[2]
    index = index.clamp_max(key.shape[2] - 1)
    moved = key.gather(2, index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
    return moved, real.gather(1, index) & inside
