"""α-entmax over rows that may be masked, empty or scattered; exact for α = 1.5, by bisection elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.errors import MissingExtraError

NEWTON_LENGTH = 16
"""Rows from this length on are solved by Newton steps, shorter ones by sorting."""
MOST_STEPS = 40
_HALVINGS = {torch.float32: 30, torch.float64: 60}
"""Halvings of an interval of length 1 that leave less than the precision."""


def entmax(
    scores: Float[Tensor, "*rows keys"], alpha: float | Tensor = 1.5, *, solver: str = "auto"
) -> Float[Tensor, "*rows keys"]:
    """Map every row of scores to probabilities, many of them exactly zero; a row of −∞ to zeros.

    Source: Peters, Niculae and Martins 2019, "Sparse Sequence-to-Sequence Models"; package `entmax`.
    Differs from it: rows without any finite score give zeros, where the package fails or gives NaN; α = 1 is softmax.

    Args:
        scores: Scores, −∞ where a key is forbidden; half precision is solved in float32.
        alpha: 1 for softmax, 1.5, 2, or any other; a tensor that broadcasts against the rows may be learned.
        solver: "sort" or "newton" for α = 1.5; "auto" chooses by length.

    Returns:
        Probabilities in the type of `scores`.

    Example:
        >>> entmax(torch.tensor([2.0, 1.0, 0.0]))
        tensor([0.8307, 0.1693, 0.0000])
    """
    precise = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    if not isinstance(alpha, Tensor) and alpha == 1.5:
        by_newton = solver == "newton" or (solver == "auto" and scores.shape[-1] >= NEWTON_LENGTH)
        weights = _Entmax15.apply(precise, by_newton)
    else:
        weights = _guarded(precise, alpha)
    return weights.to(scores.dtype)  # type: ignore[union-attr]


@torch.no_grad()
def entmax15_threshold(half: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows 1"]:
    """The τ with Σ (x − τ)₊² = 1 for every row x of halved scores; +∞ for a row of −∞.

    Newton's method on the norm ‖(x − τ)₊‖, which is convex and falls: from max − 1 it climbs to the root and never
    passes it. The norm bends less than its square, so fewer steps do; and as each step squares the error, one whose
    square is below the precision is the last.

    Source: the bounds and the monotone climb in the specification of 1.5-entmax, with p_j = (z_j / 2 − τ)₊².
    """
    top = half.amax(-1, keepdim=True)
    empty = top == -torch.inf
    tau = top.masked_fill(empty, 0.0) - 1.0
    precision = 4 * torch.finfo(half.dtype).eps
    # the norm bends at most as √keys does
    enough = math.sqrt(precision / math.sqrt(half.shape[-1]))
    rest = torch.empty_like(half)
    for _ in range(MOST_STEPS):
        torch.sub(half, tau, out=rest).relu_()
        total = rest.sum(-1, keepdim=True)
        norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        step = (norm - 1.0).mul_(norm).div_(total.clamp_min_(torch.finfo(half.dtype).tiny)).masked_fill_(empty, 0.0)
        tau += step
        if float(step.abs().max()) <= max(enough, precision * float(tau.abs().max())):
            break
    return tau.masked_fill_(empty, torch.inf)


@torch.no_grad()
def support15(scores: Float[Tensor, "*rows keys"]) -> Bool[Tensor, "*rows keys"]:
    """Where 1.5-entmax is above zero, without its values."""
    half = scores.float() / 2 if scores.dtype not in (torch.float32, torch.float64) else scores / 2
    return half > _polished(half, entmax15_threshold(half))


class _Entmax15(torch.autograd.Function):
    """1.5-entmax with the Jacobian diag(s) − s sᵀ / Σ s, s = √p."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, by_newton: bool) -> Tensor:
        half = scores / 2
        tau = entmax15_threshold(half) if by_newton else _sorted_threshold(half)
        tau = _polished(half, tau)
        roots = (half - tau).relu_()
        ctx.save_for_backward(roots)
        return roots.square()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (roots,) = ctx.saved_tensors
        gradient = upstream[0] * roots
        total = roots.sum(-1, keepdim=True)
        mean = gradient.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return gradient - mean * roots, None


def _sorted_threshold(half: Tensor) -> Tensor:
    top = half.amax(-1, keepdim=True)
    empty = top == -torch.inf
    # a sorted row of differences to its maximum stays finite, so cumulative sums do too
    ordered = (half - top.masked_fill(empty, 0.0)).clamp_min(-2.0).masked_fill(empty, 0.0)
    ordered = ordered.sort(-1, descending=True).values
    count = torch.arange(1, half.shape[-1] + 1, device=half.device, dtype=half.dtype)
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    candidates = mean - ((1 - spread) / count).clamp_min(0.0).sqrt()
    support = (candidates <= ordered).sum(-1, keepdim=True).clamp_min(1)
    return (candidates.gather(-1, support - 1) + top).masked_fill(empty, torch.inf)


@torch.no_grad()
def _polished(half: Tensor, tau: Tensor) -> Tensor:
    """τ once more in closed form from its support, so that forbidden scores cannot change a single bit of it."""
    empty = tau == torch.inf
    # the support as numbers: sums of products are many times faster than filling by a mask
    inside = torch.gt(half, tau, out=torch.empty_like(half))
    count = inside.sum(-1, keepdim=True).clamp_min_(1)
    top = half.amax(-1, keepdim=True).masked_fill_(empty, 0.0)
    # nothing of the support lies 1 below the maximum, and −∞ times 0 would be no number
    shifted = torch.sub(half, top).clamp_min_(-2.0).mul_(inside)
    mean = shifted.sum(-1, keepdim=True).div_(count)
    spread = torch.linalg.vector_norm(shifted.sub_(mean).mul_(inside), dim=-1, keepdim=True).square_()
    return (mean - ((1 - spread) / count).clamp_min_(0.0).sqrt_() + top).masked_fill_(empty, torch.inf)


def _guarded(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Any other α through the package; empty rows are filled for it and emptied again."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    filled = scores.masked_fill(empty, 0.0)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        weights = torch.softmax(filled, dim=-1)
    else:
        package = _package()
        if not isinstance(alpha, Tensor) and alpha == 2.0:
            weights = package.sparsemax(filled, dim=-1)
        else:
            # a finite stand-in: the package multiplies −∞ by zero in the gradient of α
            low = float(filled.detach().masked_fill(filled == -torch.inf, math.inf).min()) - 1e4
            weights = package.entmax_bisect(filled.clamp_min(low), alpha, dim=-1, n_iter=_HALVINGS[filled.dtype])
            weights = weights.masked_fill(scores == -torch.inf, 0.0)
    return weights.masked_fill(empty, 0.0)


def _package() -> Any:
    try:
        import entmax as package
    except ImportError:
        raise MissingExtraError("entmax", "sparsefinder") from None
    return package
