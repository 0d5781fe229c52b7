r"""α-entmax over rows that may be masked, empty or scattered; exact for α = 1.5, by Newton's method otherwise.

$$ p_j = [(\alpha - 1)\, z_j - \tau]_+^{1 / (\alpha - 1)}, \qquad \sum_j p_j = 1 $$

Every row is shifted by its maximum first, so that all numbers that decide the result are between −1 / (α − 1) and 0,
where the type is most precise. For α = 1.5, p_j = r_j² / 4 with the roots r_j = (x_j − t)₊ of the shifted scores x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
PARTIAL_LENGTH = 2048
"""Row length from which the largest scores alone are sorted on the CPU; Newton's method reads long rows too often."""
PARTIAL_SCORES = 1 << 15
"""Number of scores of a call up to which rows of any length are sorted in part on the CPU: Newton's method has more
operations, whose fixed time dominates small calls."""
PARTIAL_KEYS = 32
"""Number of largest scores sorted in part in rows of a large call; rows with a larger support are solved by Newton's
method."""
SMALL_KEYS = 64
"""The same in small calls, where eight times as many are sorted for rows with a larger support."""
SORTED_KEYS = 256
"""Row length up to which rows of small calls are sorted as a whole."""
PROBED_ROWS = 16
"""Number of rows whose support is measured before many rows are sorted in part."""
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
    top = scores.amax(-1, keepdim=True)
    # the maximum has the shifted score 0, so its root is −t
    threshold = -_solved(scores, _same).amax(-1, keepdim=True)
    return top.masked_fill_(top == -torch.inf, 0.0), threshold.masked_fill_(threshold == 0, torch.inf)


@torch.no_grad()
def support15(scores: Float[Tensor, "*rows keys"]) -> Bool[Tensor, "*rows keys"]:
    """True for the keys with a positive 1.5-entmax probability."""
    precise = scores.to(compute_dtype(scores.dtype))
    return _solved(precise, _same) > 0


class _Entmax15(torch.autograd.Function):
    """1.5-entmax with the Jacobian diag(s) − s sᵀ / Σ s, where s = √p.

    The backward pass computes s from the saved output, so that differentiating it again includes the change of s.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, solver: str) -> Tensor:
        weights = _solved(scores, _quarter_square, solver)
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


def _same(roots: Tensor) -> Tensor:
    """Roots [*rows keys] themselves."""
    return roots


def _quarter_square(roots: Tensor) -> Tensor:
    """Probabilities r² / 4 of roots [*rows keys], in place."""
    return roots.square_().mul_(0.25)


def _solved(scores: Tensor, finish: Callable[[Tensor], Tensor], solver: str = "auto") -> Tensor:
    """`finish`(roots) of the scores [*rows keys], roots r = (x − t)₊ with Σ r² = 4; `finish` maps 0 to 0."""
    keys = scores.shape[-1]
    if solver == "auto" and keys >= NEWTON_LENGTH:
        solver = "newton"
        if tests_convergence(scores) and scores.numel():
            solver = "partial" if scores.numel() <= PARTIAL_SCORES or _partial_pays(scores) else solver
    if solver == "partial" and scores.numel():
        return _partially_sorted(scores, finish)
    if solver == "newton":
        return _by_newton(scores, finish)
    shifted = _shifted(scores)
    ordered = shifted.sort(-1, descending=True).values
    return finish(_exact_roots(shifted, (shifted - _sorted_threshold(ordered)).relu_()))


def _partial_pays(scores: Tensor) -> bool:
    """True for rows so long that their largest scores are faster to sort, if some of the rows have a small support."""
    if scores.shape[-1] < PARTIAL_LENGTH:
        return False
    rows = scores.view(-1, scores.shape[-1])
    if len(rows) < 16 * PROBED_ROWS:
        return True
    roots = _largest_roots(rows[:: len(rows) // PROBED_ROWS], PARTIAL_KEYS)[0]
    return 2 * int((roots[:, -1] > 0).sum()) <= len(roots)


def _partially_sorted(scores: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """`finish`(roots) [*rows keys] from the largest scores of every row, more of them in rows with a larger support."""
    keys = scores.shape[-1]
    small = scores.numel() <= PARTIAL_SCORES
    count = keys if small and keys <= SORTED_KEYS else min(keys, SMALL_KEYS if small else PARTIAL_KEYS)
    result = torch.zeros_like(scores)
    roots, index = _largest_roots(scores, count)
    # before `finish` overwrites the roots
    larger = roots[..., -1] > 0 if count < keys and float(roots[..., -1].amax()) > 0 else None
    result.scatter_(-1, index, finish(roots).to(scores.dtype))
    if larger is not None:
        own = scores[larger]  # [larger keys]
        result[larger] = _by_newton(own, finish) if not small or keys <= 8 * count else _partly(own, finish, 8 * count)
    return result


def _partly(scores: Tensor, finish: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """`finish`(roots) [rows keys] from the `count` largest scores, by Newton's method if they are too few."""
    roots, index = _largest_roots(scores, count)
    if float(roots[:, -1].amax()) > 0:
        return _by_newton(scores, finish)
    return torch.zeros_like(scores).scatter_(-1, index, finish(roots).to(scores.dtype))


def _by_newton(scores: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """`finish`(roots) [*rows keys] by Newton's method."""
    shifted = _shifted(scores)
    return finish(_exact_roots(shifted, _newton(shifted)))


def _largest_roots(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Roots of the `count` largest scores in float64, in descending order, and their indices [*rows count].

    In float64 the closed form of the threshold needs no refinement. The last root is 0 if the support is not larger.
    """
    largest = scores.topk(count, dim=-1)
    wide = largest.values.double()
    # the lowest number in place of −∞, whose difference to itself is NaN
    shifted = (wide - wide[..., :1].clamp_min(torch.finfo(scores.dtype).min)).clamp_min_(-2.0)
    return (shifted - _sorted_threshold(shifted)).relu_(), largest.indices


def _shifted(scores: Tensor) -> Tensor:
    """Shifted scores x = max(z − maximum, −2) [*rows keys], −2 in a row of −∞: the threshold is at least −2."""
    top = scores.amax(-1, keepdim=True)
    return (scores - top.masked_fill_(top == -torch.inf, 0.0)).clamp_min_(-2.0)


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
    total = ordered.cumsum(-1)
    mean = total / count
    # 4 − Σ x² + k · mean²
    left = torch.rsub(ordered.square().cumsum_(-1), 4.0).addcmul_(mean, total).div_(count).clamp_min_(0.0)
    candidates = mean.sub_(left.sqrt_())
    # t_k rises up to the support, where t_k ≤ x_(k); an empty row consists of −2, and stays without support
    return candidates.masked_fill_(candidates > ordered, -2.0).amax(-1, keepdim=True).clamp_min_(-2.0)
