r"""α-entmax over rows that may be masked, empty or scattered; exact for α = 1.5, by bisection otherwise.

$$ p_j = [(\alpha - 1)\, z_j - \tau]_+^{1 / (\alpha - 1)}, \qquad \sum_j p_j = 1 $$

For α = 1.5 this is p_j = (z_j / 2 − τ)₊². The halved scores z / 2 are called `half` throughout this module.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.errors import MissingExtraError
from graftwork.methods.sparsefinder.tensors import row_norm

NEWTON_LENGTH = 16
"""Row length from which Newton's method is used; shorter rows are sorted."""
MOST_STEPS = 40
"""Upper bound on the Newton iterations."""
BLIND_STEPS = 8
"""Newton iterations on an accelerator, where a test for convergence would wait for the device; 6 reach the precision of
float32 in rows of up to 32,768 scores of any scale."""
_HALVINGS = {torch.float32: 30, torch.float64: 60}
"""Bisection steps after which an interval of length 1 is below the precision of the type."""


def entmax(
    scores: Float[Tensor, "*rows keys"], alpha: float | Tensor = 1.5, *, solver: str = "auto"
) -> Float[Tensor, "*rows keys"]:
    """Map every row of scores to sparse probabilities; a row of −∞ yields zeros.

    Source: Peters, Niculae and Martins 2019, "Sparse Sequence-to-Sequence Models"; package `entmax`.
    Differs from it: rows without a finite score give zeros, where the package fails or returns NaN; α = 1 is softmax.

    Args:
        scores: Scores, −∞ for masked keys; half precision is solved in float32.
        alpha: 1 for softmax, 1.5, 2, or any other number; a tensor [... 1] that broadcasts against the rows receives
            a gradient.
        solver: "sort" or "newton" for α = 1.5; "auto" chooses by row length.

    Returns:
        Probabilities in the type of `scores`.

    Example:
        >>> entmax(torch.tensor([2.0, 1.0, 0.0]))
        tensor([0.8307, 0.1693, 0.0000])
    """
    precise = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    if not isinstance(alpha, Tensor) and alpha == 1.5:
        by_newton = solver == "newton" or (solver == "auto" and scores.shape[-1] >= NEWTON_LENGTH)
        weights = cast(Tensor, _Entmax15.apply(precise, by_newton))  # pyright: ignore[reportUnknownMemberType]
    else:
        weights = _any_alpha(precise, alpha)
    return weights.to(scores.dtype)


@torch.no_grad()
def entmax15_threshold(half: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows 1"]:
    """Threshold τ with Σ (x − τ)₊² = 1 for every row x of halved scores; +∞ for a row of −∞.

    Newton's method solves f(τ) = ‖(x − τ)₊‖₂ = 1. f is convex and decreasing, so the iterates that start at
    max(x) − 1 increase monotonically to the root. With S = Σ (x − τ)₊ and f' = −S / f, one step is

        τ ← τ + (f − 1) · f / S

    The norm has less curvature than its square and needs fewer steps. Convergence is quadratic, so the loop stops at
    the first step whose square is below the precision; on an accelerator, after a fixed number of steps.

    Source: the bounds and the monotone iteration of the specification of 1.5-entmax, with p_j = (z_j / 2 − τ)₊².
    """
    top = half.amax(-1, keepdim=True)  # [*rows 1]
    empty = top == -torch.inf
    tau = top.masked_fill(empty, 0.0) - 1.0
    precision = 4 * torch.finfo(half.dtype).eps
    # step size whose squared error is below the precision, with √keys as the curvature of the norm
    enough = math.sqrt(precision / math.sqrt(half.shape[-1]))
    rest = torch.empty_like(half)
    on_host = half.device.type == "cpu"
    for _ in range(MOST_STEPS if on_host else BLIND_STEPS):
        torch.sub(half, tau, out=rest).relu_()  # [*rows keys] − [*rows 1]
        total = rest.sum(-1, keepdim=True)
        norm = row_norm(rest)
        step = (norm - 1.0).mul_(norm).div_(total.clamp_min_(torch.finfo(half.dtype).tiny)).masked_fill_(empty, 0.0)
        tau += step
        if on_host and float(step.abs().max()) <= max(enough, precision * float(tau.abs().max())):
            break
    return tau.masked_fill_(empty, torch.inf)


@torch.no_grad()
def support15(scores: Float[Tensor, "*rows keys"]) -> Bool[Tensor, "*rows keys"]:
    """True for the keys with a positive 1.5-entmax probability."""
    half = scores.float() / 2 if scores.dtype not in (torch.float32, torch.float64) else scores / 2
    return half > _polished(half, entmax15_threshold(half))


class _Entmax15(torch.autograd.Function):
    """1.5-entmax with the Jacobian diag(s) − s sᵀ / Σ s, where s = √p."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, by_newton: bool) -> Tensor:
        half = scores / 2
        tau = entmax15_threshold(half) if by_newton else _sorted_threshold(half)
        tau = _polished(half, tau)
        roots = (half - tau).relu_()  # [*rows keys] − [*rows 1]
        ctx.save_for_backward(roots)
        return roots.square()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (roots,) = ctx.saved_tensors
        gradient = upstream[0] * roots
        total = roots.sum(-1, keepdim=True)  # [*rows 1]
        mean = gradient.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return gradient - mean * roots, None


def _sorted_threshold(half: Tensor) -> Tensor:
    """Threshold τ [*rows 1] in closed form from sorted rows.

    For the k largest x: τ_k = mean_k − √((1 − Σ (x − mean_k)²) / k); the support is the largest k with τ_k ≤ x_(k).
    """
    top = half.amax(-1, keepdim=True)  # [*rows 1]
    empty = top == -torch.inf
    # differences to the row maximum are finite, and so are their cumulative sums
    ordered = (half - top.masked_fill(empty, 0.0)).clamp_min(-2.0).masked_fill(empty, 0.0)
    ordered = ordered.sort(-1, descending=True).values  # [*rows keys]
    count = torch.arange(1, half.shape[-1] + 1, device=half.device, dtype=half.dtype)  # [keys]
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    candidates = mean - ((1 - spread) / count).clamp_min(0.0).sqrt()
    support = (candidates <= ordered).sum(-1, keepdim=True).clamp_min(1)  # [*rows 1]
    return (candidates.gather(-1, support - 1) + top).masked_fill(empty, torch.inf)


@torch.no_grad()
def _polished(half: Tensor, tau: Tensor) -> Tensor:
    """Recompute τ [*rows 1] in closed form from its support, so that masked scores cannot change a single bit of it."""
    empty = tau == torch.inf
    # the support in floating point: products are many times faster than masked fills
    inside = torch.gt(half, tau, out=torch.empty_like(half))  # [*rows keys]
    count = inside.sum(-1, keepdim=True).clamp_min_(1)
    top = half.amax(-1, keepdim=True).masked_fill_(empty, 0.0)
    # the support is within 1 of the maximum; the clamp avoids −∞ · 0 = NaN
    shifted = torch.sub(half, top).clamp_min_(-2.0).mul_(inside)
    mean = shifted.sum(-1, keepdim=True).div_(count)
    spread = row_norm(shifted.sub_(mean).mul_(inside)).square_()
    return (mean - ((1 - spread) / count).clamp_min_(0.0).sqrt_() + top).masked_fill_(empty, torch.inf)


def _any_alpha(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Solve any other α with the package `entmax`; empty rows are filled before and zeroed after."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)  # [*rows 1]
    filled = scores.masked_fill(empty, 0.0)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        weights = torch.softmax(filled, dim=-1)
    else:
        package = _package()
        if not isinstance(alpha, Tensor) and alpha == 2.0:
            weights = cast(Tensor, package.sparsemax(filled, dim=-1))
        else:
            # finite replacement of −∞: the package multiplies it by zero in the gradient of α
            low = float(filled.detach().masked_fill(filled == -torch.inf, math.inf).min()) - 1e4
            weights = cast(
                Tensor, package.entmax_bisect(filled.clamp_min(low), alpha, dim=-1, n_iter=_HALVINGS[filled.dtype])
            )
            weights = weights.masked_fill(scores == -torch.inf, 0.0)
    return weights.masked_fill(empty, 0.0)


def _package() -> Any:
    try:
        import entmax as package  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("entmax", "sparsefinder") from None
    return package
