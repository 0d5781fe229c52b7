"""What projections are trained on: gold pairs near, sampled other pairs far."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError


def projection_loss(
    distance: Float[Tensor, "batch heads queries keys"],
    gold: Bool[Tensor, "batch heads queries keys"],
    allowed: Bool[Tensor, "batch heads queries keys"],
    *,
    loss: str = "sum_hinge",
    margin: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The mean over sentences and heads of a contrast between gold and other pairs.

    Source: section 3.4 of the specification; sum_hinge is the authors' form, one hinge per query over sums.
    Differs from the authors' code: negatives are drawn among allowed pairs that are not gold, as many as there are; a
    query without positives or negatives is not counted, nor is a head of a sentence without counted queries.

    Args:
        distance: Squared distances of projected queries and keys.
        gold: Pairs that entmax keeps.
        allowed: Pairs that may be looked at: real, causal, and outside fixed patterns if those are excluded.
        loss: sum_hinge, pair_hinge, or logistic (every other pair counts, balanced against the gold ones).
        margin: ω.
        generator: Draws the negatives; torch's own if left out.

    Raises:
        ConfigError: If there is no such loss.
    """
    positive, other = gold & allowed, allowed & ~gold
    counted = positive.any(-1) & other.any(-1)
    if loss == "sum_hinge":
        negative = sample_negatives(positive, other, generator)
        row = margin + (distance * positive).sum(-1) - (distance * negative).sum(-1)
        return _mean(row.clamp_min(0.0), counted)
    if loss == "pair_hinge":
        return _mean(_pair_rows(distance, positive, other, margin, generator), counted)
    if loss == "logistic":
        near = (F.softplus(distance - margin) * positive).sum((-2, -1)) / positive.sum((-2, -1)).clamp_min(1)
        far = (F.softplus(margin - distance) * other).sum((-2, -1)) / other.sum((-2, -1)).clamp_min(1)
        both = positive.any(-1).any(-1) & other.any(-1).any(-1)
        return ((near + far) * both).sum() / both.sum().clamp_min(1)
    raise ConfigError(f"loss is {loss!r}. Expected one of: sum_hinge, pair_hinge, logistic.")


def fast_sum_hinge(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    gold: Bool[Tensor, "batch heads queries keys"],
    allowed: Bool[Tensor, "batch heads queries keys"],
    *,
    margin: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """`projection_loss` with sum_hinge on squared distances, without any distance.

    A signed sum of squared distances splits into norms and one product with the summed keys, so gradients never have
    the size queries × keys.
    """
    positive, other = gold & allowed, allowed & ~gold
    counted = positive.any(-1) & other.any(-1)
    sign = positive.to(query.dtype) - sample_negatives(positive, other, generator).to(query.dtype)
    row = margin + sign.sum(-1) * query.square().sum(-1) + (sign @ key.square().sum(-1, keepdim=True))[..., 0]
    row = row - 2 * (query * (sign @ key)).sum(-1)
    return _mean(row.clamp_min(0.0), counted)


def sample_negatives(
    positive: Bool[Tensor, "batch heads queries keys"],
    other: Bool[Tensor, "batch heads queries keys"],
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch heads queries keys"]:
    """For every query as many other keys as it has positives, without replacement; all of them if there are fewer."""
    noise = torch.rand(other.shape, generator=generator, device=other.device).masked_fill(~other, 2.0)
    wanted = torch.minimum(positive.sum(-1, keepdim=True), other.sum(-1, keepdim=True))
    smallest = noise.topk(max(1, int(wanted.max())), dim=-1, largest=False).values
    last = smallest.gather(-1, (wanted - 1).clamp_min(0))
    return (noise <= last) & other & (wanted > 0)


def _pair_rows(
    distance: Tensor, positive: Tensor, other: Tensor, margin: float, generator: torch.Generator | None
) -> Tensor:
    """The mean hinge of a query over its positives, each against one other key drawn uniformly."""
    order = other.byte().sort(dim=-1, descending=True, stable=True).indices
    count = other.sum(-1, keepdim=True)
    chosen = (torch.rand(distance.shape, generator=generator, device=distance.device) * count).long()
    negative = distance.gather(-1, order.gather(-1, chosen.clamp_max((count - 1).clamp_min(0))))
    hinge = (margin + distance - negative).clamp_min(0.0) * positive
    return hinge.sum(-1) / positive.sum(-1).clamp_min(1)


def _mean(rows: Tensor, counted: Tensor) -> Tensor:
    per_head = (rows * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    used = counted.any(-1)
    return (per_head * used).sum() / used.sum().clamp_min(1)
