r"""α-entmax over rows that may be masked, empty or scattered; exact for α = 1.5, by Newton's method otherwise.

$$ p_j = [(\alpha - 1)\, z_j - \tau]_+^{1 / (\alpha - 1)}, \qquad \sum_j p_j = 1 $$

Every row is shifted by its maximum first, so that all numbers that decide the result are between −1 / (α − 1) and 0,
where the type is most precise. For α = 1.5, p_j = r_j² / 4 with the roots r_j = (x_j − t)₊ of the shifted scores x.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.any_alpha import LARGEST_ALPHA, entmax_alpha
from graftwork.methods.sparsefinder.tensors import row_norm
from graftwork.surgery.precision import compute_dtype, tests_convergence

NEWTON_LENGTH = 16
"""Row length from which Newton's method is used; shorter rows are sorted."""
PARTIAL_LENGTH = 8192
"""Row length from which rows are sorted in part on the CPU; Newton's method reads a row of this length too often."""
PARTIAL_KEYS = 32
"""Number of largest scores sorted in part; rows with a larger support are solved by Newton's method."""
MOST_STEPS = 40
"""Upper bound on the Newton iterations."""
BLIND_STEPS = 8
"""Newton iterations on an accelerator and under torch.compile, where a test for convergence would wait for the device;
6 reach the precision of float32 in rows of up to 32,768 scores of any scale."""


def entmax(
    scores: Float[Tensor, "*rows keys"], alpha: float | Tensor = 1.5, *, solver: str = "auto"
) -> Float[Tensor, "*rows keys"]:
    """Map every row of scores to sparse probabilities; a row of −∞ yields zeros.

    Source: Peters, Niculae and Martins 2019, "Sparse Sequence-to-Sequence Models"; package `entmax`.
    Differs from it: rows without a finite score give zeros, where the package fails or returns NaN; α = 1 is softmax;
    second derivatives are right.

    Args:
        scores: Scores, −∞ for masked keys; half precision is solved in float32.
        alpha: 1 for softmax, 1.5, 2, or any other number up to 3, above 2 solved in float64. A tensor [... 1] between 1
            and 2 that broadcasts against the rows receives a gradient, at its bounds too.
        solver: "sort", "newton" or "partial" (sorting the largest scores) for α = 1.5; "auto" chooses by row length.

    Returns:
        Probabilities in the type of `scores`.

    Raises:
        ConfigError: If `alpha` is a number outside 1 to 3.

    Example:
        >>> entmax(torch.tensor([2.0, 1.0, 0.0]))
        tensor([0.8307, 0.1693, 0.0000])
    """
    precise = scores.to(compute_dtype(scores.dtype))
    if isinstance(alpha, Tensor) or alpha != 1.5:
        if not isinstance(alpha, Tensor) and not 1.0 <= alpha <= LARGEST_ALPHA:
            raise ConfigError(
                f"alpha is {alpha}. Expected a number between 1 (softmax) and {LARGEST_ALPHA:g}, usually 1.5."
            )
        return entmax_alpha(precise, alpha).to(scores.dtype)
    weights = cast(Tensor, _Entmax15.apply(precise, solver))  # pyright: ignore[reportUnknownMemberType]
    return weights.to(scores.dtype)


@torch.no_grad()
def entmax15_threshold(
    scores: Float[Tensor, "*rows keys"],
) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]:
    """Row maximum m and threshold t of 1.5-entmax, with p = ((z − m − t)₊ / 2)²; (0, +∞) for a row of −∞."""
    top, shifted = _shifted(scores)
    roots = _roots(shifted)
    # the maximum has the shifted score 0, so its root is −t
    threshold = -roots.amax(-1, keepdim=True)
    return top, threshold.masked_fill_(threshold == 0, torch.inf)


@torch.no_grad()
def support15(scores: Float[Tensor, "*rows keys"]) -> Bool[Tensor, "*rows keys"]:
    """True for the keys with a positive 1.5-entmax probability."""
    precise = scores.to(compute_dtype(scores.dtype))
    return _roots(_shifted(precise)[1]) > 0


class _Entmax15(torch.autograd.Function):
    """1.5-entmax with the Jacobian diag(s) − s sᵀ / Σ s, where s = √p.

    The backward pass computes s from the saved output, so that differentiating it again includes the change of s.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, solver: str) -> Tensor:
        weights = _roots(_shifted(scores)[1], solver).square_().mul_(0.25)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # √p has an infinite derivative at 0
            inside = weights > 0
            slope = weights.where(inside, 1.0).sqrt() * inside
        else:
            slope = weights.sqrt()
        gradient = upstream[0] * slope
        total = slope.sum(-1, keepdim=True)  # [*rows 1]
        mean = gradient.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return torch.addcmul(gradient, slope, mean, value=-1.0), None  # gradient − slope · mean


def _shifted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Row maximum [*rows 1], 0 for a row of −∞, and x = max(z − maximum, −2) [*rows keys].

    The threshold is at least −2, so scores below it have the probability 0.
    """
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    return top, (scores - top).clamp_min_(-2.0)


def _roots(shifted: Tensor, solver: str = "auto") -> Tensor:
    """Roots r = (x − t)₊ [*rows keys] with Σ r² = 4."""
    keys = shifted.shape[-1]
    if solver == "auto" and keys >= NEWTON_LENGTH:
        solver = "partial" if keys >= PARTIAL_LENGTH and tests_convergence(shifted) else "newton"
    if solver == "partial" and keys > PARTIAL_KEYS:
        largest = shifted.topk(PARTIAL_KEYS, dim=-1).values  # [*rows PARTIAL_KEYS]
        found = _exact_roots(largest, (largest - _sorted_threshold(largest)).relu_())
        # the maximum has the shifted score 0, so its root is −t
        roots = (shifted + found[..., :1]).relu_()
        larger = found[..., -1] > 0  # [*rows]: the support may exceed the sorted scores
        if bool(larger.any()):
            own = shifted[larger]  # [larger keys]
            roots[larger] = _exact_roots(own, _newton(own))
        return roots
    if solver == "newton" or (solver == "partial" and keys >= NEWTON_LENGTH):
        return _exact_roots(shifted, _newton(shifted))
    return _exact_roots(shifted, (shifted - _sorted_threshold(shifted.sort(-1, descending=True).values)).relu_())


def _exact_roots(shifted: Tensor, rest: Tensor) -> Tensor:
    """Roots r [*rows keys] from approximate ones, which give the support; `rest` is overwritten.

    The threshold is recomputed in closed form from the support, so that masked scores cannot change a single bit. With
    c = x − mean over the k scores of the support, r = c + √((4 − Σ c²) / k); the sum of r² is then 4 to the precision
    of r, also if a threshold near −2 is coarser than the distances to it.
    """
    # the support in floating point: products are many times faster than masked fills
    inside = rest.sign_()  # [*rows keys]
    count = inside.sum(-1, keepdim=True).clamp_min_(1.0)  # [*rows 1]
    centred = shifted * inside
    mean = centred.sum(-1, keepdim=True).div_(count)
    centred.addcmul_(inside, mean, value=-1.0)
    left = centred.sum(-1, keepdim=True).div_(count)  # rounding error of the mean
    spread = row_norm(centred).square_() - count * left.square()
    root = ((4.0 - spread) / count).clamp_min_(0.0).sqrt_().sub_(left)
    return centred.addcmul_(inside, root).relu_()


def _newton(shifted: Tensor) -> Tensor:
    """Roots (x − t)₊ [*rows keys] by Newton's method on f(t) = ‖(x − t)₊‖₂ = 2.

    f is convex and decreasing, so the iterates that start at −2 increase monotonically to the root, and every step can
    be subtracted from the roots in place. With S = Σ (x − t)₊ and f' = −S / f, one step is

        t ← t + (f − 2) · f / S

    The norm has less curvature than its square and needs fewer steps. Convergence is quadratic, so the loop stops at
    the first step whose square is below the precision; on an accelerator, after a fixed number of steps.
    """
    rest = shifted + 2.0
    tests = tests_convergence(shifted)
    # step size whose squared error is below the precision, with √keys as the curvature of the norm
    enough = math.sqrt(4 * torch.finfo(shifted.dtype).eps / math.sqrt(max(1, shifted.shape[-1])))
    for _ in range(MOST_STEPS if tests else BLIND_STEPS):
        total = rest.sum(-1, keepdim=True).clamp_min_(torch.finfo(shifted.dtype).tiny)
        norm = row_norm(rest)
        # [*rows 1]; 0 for an empty row; a negative step is rounding, and would add keys to the support
        step = (norm - 2.0).mul_(norm).div_(total).clamp_min_(0.0)
        rest.sub_(step).relu_()
        if tests and not float(step.max()) > enough:
            break
    return rest


def _sorted_threshold(ordered: Tensor) -> Tensor:
    """Threshold t [*rows 1] in closed form from shifted scores in descending order [*rows keys].

    For the k largest x: t_k = mean_k − √((4 − Σ (x − mean_k)²) / k); the support is the largest k with t_k ≤ x_(k).
    """
    count = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device, dtype=ordered.dtype)  # [keys]
    mean = ordered.cumsum(-1) / count
    spread = ordered.square().cumsum(-1) - count * mean.square()
    candidates = mean - ((4.0 - spread) / count).clamp_min(0.0).sqrt()
    support = (candidates <= ordered).sum(-1, keepdim=True).clamp_min(1)  # [*rows 1]
    # an empty row consists of −2, and stays without support
    return candidates.gather(-1, support - 1).clamp_min_(-2.0)
