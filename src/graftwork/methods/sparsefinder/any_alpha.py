r"""α-entmax for any α from 1 to 3, with the gradient of α.

With a = α − 1, scores s shifted by their row maximum, and a threshold v ≥ 0,

$$ p_j = \exp_a(s_j - v), \qquad \exp_a(y) = [1 + a y]_+^{1/a}, \qquad \exp_0(y) = e^y $$

This form has the limit a → 0, softmax, where v is the logarithm of the sum; the usual form divides 0 by 0 there.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from graftwork.surgery.precision import tests_convergence

LARGEST_ALPHA = 3.0
"""Largest α: beyond, p has a slope at the threshold that the rounding of float64 scores does not resolve."""
MOST_STEPS = 60
"""Upper bound on the Newton iterations."""
BLIND_STEPS = 14
"""Newton iterations where a test for convergence would wait for the device."""
BY_POWERS = 1.25
"""α from which powers are computed directly; below, by logarithms, which keep the precision of differences near 0."""
HALVINGS = 60
"""Bisection steps for α above 2, where Newton's method may diverge."""
_SERIES = 0.05
"""Size of the argument below which a difference of nearly equal terms is computed by its series."""


def entmax_alpha(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Probabilities of scores [*rows keys] in float32 or float64; zeros in a row of −∞."""
    if isinstance(alpha, Tensor):
        weights = _EntmaxAlpha.apply(scores, alpha, None)  # pyright: ignore[reportUnknownMemberType]
        return cast(Tensor, weights)
    if alpha == 1.0:
        empty = (scores == -torch.inf).all(-1, keepdim=True)  # [*rows 1]
        return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    # above 2, p = r^q with q < 1 magnifies the rounding of r
    precise = scores.double() if alpha > 2.0 else scores
    given = torch.full((), alpha, dtype=precise.dtype, device=precise.device)
    weights = _EntmaxAlpha.apply(precise, given, alpha)  # pyright: ignore[reportUnknownMemberType]
    return cast(Tensor, weights).to(scores.dtype)


class _EntmaxAlpha(torch.autograd.Function):
    """α-entmax with the Jacobian diag(s) − s sᵀ / Σ s, where s = p^(2 − α), and the gradient of α.

    The backward pass is a function of the saved output and α, so that it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor, number: float | None) -> Tensor:
        weights = _solve(scores, alpha.to(scores.dtype), number)
        ctx.save_for_backward(weights, alpha)
        return weights

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weights, alpha = ctx.saved_tensors
        order = alpha.to(weights.dtype) - 1.0
        inside = weights > 0
        logs = weights.where(inside, 1.0).log()  # [*rows keys]
        slope = torch.exp((1.0 - order) * logs) * inside
        total = slope.sum(-1, keepdim=True)  # [*rows 1]
        mean = (upstream[0] * slope).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        gradient = slope * (upstream[0] - mean)
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        change = _change(weights, logs, slope, order)
        by_row = (upstream[0] * change).sum(-1, keepdim=True) - mean * change.sum(-1, keepdim=True)
        return gradient, by_row.sum_to_size(alpha.shape).to(alpha.dtype), None


def _change(weights: Tensor, logs: Tensor, slope: Tensor, order: Tensor) -> Tensor:
    """Derivative of exp_a(y) by a at constant y, as a function of p = exp_a(y) [*rows keys].

    With t = a y = p^a − 1, it is p y² φ(t), φ(t) = (t / (1 + t) − log(1 + t)) / t² = −1/2 + 2t/3 − 3t²/4 + …
    """
    power = order * logs  # log(1 + t)
    moved = torch.expm1(power)  # t
    near = moved.abs() < _SERIES
    small = moved.where(near, 0.0)
    series = torch.zeros_like(small)
    for term in reversed(range(2, 14)):
        series = series * small + (-1) ** (term + 1) * (1 - 1 / term)
    # y = log p · (e^w − 1) / w, w = a log p
    short = power.where(near, 0.0)
    ratio = 1 + short / 2 * (1 + short / 3 * (1 + short / 4 * (1 + short / 5 * (1 + short / 6 * (1 + short / 7)))))
    by_series = weights * (logs * ratio).square() * series
    divisor = order.where(order != 0, 1.0).square()
    directly = (slope * moved - weights * power) / divisor
    return by_series.where(near, directly)


def _solve(scores: Tensor, alpha: Tensor, number: float | None) -> Tensor:
    """Probabilities [*rows keys]; `number` is α if it is not a tensor."""
    order = alpha - 1.0
    top = scores.amax(-1, keepdim=True)  # [*rows 1]
    # below the floor the probability is 0 in any type, for every threshold; it replaces −∞, which times 0 is NaN
    shifted = torch.maximum(scores - top.masked_fill(top == -torch.inf, 0.0), -2.0 / order.clamp_min(2e-4))
    if number is not None and number >= BY_POWERS:
        root = _bisected(shifted, number - 1.0) if number > 2.0 else _newton_by_powers(shifted, number - 1.0)
        weights = _power(root, number - 1.0)
    else:
        weights = _exponential(shifted - _newton(shifted, order), order)[0]
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total.masked_fill_(total == 0, 1.0))


def _exponential(y: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """exp_a(y) and the base (1 + a y)₊ [*rows keys]."""
    moved = (y * order).clamp_min_(-1.0)
    base = moved + 1.0
    # log1p keeps the precision of y if a is small
    exponent = moved.log1p_().div_(order.where(order != 0, 1.0))
    return torch.where(order == 0, y, exponent).exp_(), base


def _newton(shifted: Tensor, order: Tensor) -> Tensor:
    """Threshold v [*rows 1] by Newton's method on ‖(1 + a (s − v))₊‖ of order 1/a, for 0 ≤ a ≤ 1.

    The norm is convex and decreasing in v, so the iterates from 0 increase monotonically to the root. With F = Σ p and
    D = Σ p^(1 − a), one step is v ← v + F · (1 − F^(−a)) / (a D); for a = 0 it is F log F / D.
    """
    threshold = torch.zeros_like(shifted[..., :1])
    divisor = order.where(order != 0, 1.0)
    tests, enough = tests_convergence(shifted), _enough(shifted)
    for _ in range(MOST_STEPS if tests else BLIND_STEPS):
        weights, base = _exponential(shifted - threshold, order)
        total = weights.sum(-1, keepdim=True)  # F
        slope = weights.div_(base.clamp_min_(torch.finfo(base.dtype).tiny)).sum(-1, keepdim=True)  # D
        # an empty row keeps the threshold 0
        total, slope = total.masked_fill(total == 0, 1.0), slope.masked_fill(slope == 0, 1.0)
        logs = total.log()
        step = total * torch.where(order == 0, logs, -torch.expm1(-order * logs) / divisor) / slope
        threshold = threshold + step
        if tests and not float(step.abs().max()) > enough:
            break
    return threshold


def _newton_by_powers(shifted: Tensor, order: float) -> Tensor:
    """Roots r = (a (s − v) + 1)₊ [*rows keys] by the steps of `_newton`, subtracted in place.

    The roots of equal scores are as small as n^(−a); computed as 1 − a v, they would lose their precision.
    """
    scaled = shifted * order
    lowest = torch.ones_like(scaled[..., :1])  # root of the maximum, 1 − a v
    tests, enough = tests_convergence(shifted), _enough(shifted)
    for _ in range(MOST_STEPS if tests else BLIND_STEPS):
        roots = (scaled + lowest).relu_()
        slope = roots.pow(1.0 / order - 1.0).mul_(roots.sign())  # 0⁰ = 1
        total = (slope * roots).sum(-1, keepdim=True)  # F
        slope = slope.sum(-1, keepdim=True)  # D
        total, slope = total.masked_fill(total == 0, 1.0), slope.masked_fill(slope == 0, 1.0)
        step = (total - total.pow(1.0 - order)) / slope
        lowest = lowest - step
        if tests and not float((step / lowest).abs().max()) > enough:
            break
    return (scaled + lowest).relu_()


def _power(roots: Tensor, order: float) -> Tensor:
    """r^(1/a) of roots [*rows keys]."""
    return roots.clone() if order == 1.0 else roots.pow(1.0 / order)


def _bisected(shifted: Tensor, order: float) -> Tensor:
    """Roots r = (a (s − v) + 1)₊ [*rows keys] by bisection of 1 − a v, from n^(−a) for equal scores to 1."""
    scaled = shifted * order
    high = torch.ones_like(scaled[..., :1])
    low = torch.full_like(high, float(max(1, shifted.shape[-1])) ** -order)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = _power((scaled + middle).relu_(), order).sum(-1, keepdim=True) >= 1.0
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (scaled + high).relu_()


def _enough(shifted: Tensor) -> float:
    """Size of a step whose square is below the precision."""
    return math.sqrt(torch.finfo(shifted.dtype).eps / math.sqrt(max(1, shifted.shape[-1]))) / 4
