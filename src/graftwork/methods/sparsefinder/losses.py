"""Losses of the projections: gold pairs become nearer than sampled negative pairs."""

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
    """Contrastive loss between gold pairs P and negatives N of every query, averaged over sentences and heads.

    | loss | term of one query |
    |---|---|
    | sum_hinge | max(0, ω + Σ_P D − Σ_N D) |
    | pair_hinge | mean over P of max(0, ω + D_p − D_n), one sampled n per p |

    logistic is softplus(D − ω) averaged over all gold pairs, plus softplus(ω − D) averaged over all other pairs.

    Source: section 3.4 of the specification; sum_hinge is the authors' form, one hinge per query over sums.
    Differs from the authors' code: negatives are sampled among allowed pairs that are not gold, as many as there are
    gold pairs; queries without positives or negatives are excluded from the mean, and so are heads of a sentence
    without such queries.

    Args:
        distance: Squared distances D of projected queries and keys.
        gold: Pairs with a positive entmax probability.
        allowed: Pairs that count: not padding, causal, and outside the fixed patterns if those are excluded.
        loss: sum_hinge, pair_hinge, or logistic (all other pairs count, balanced against the gold pairs).
        margin: ω.
        generator: Generator of the negatives; torch's default generator if omitted.

    Raises:
        ConfigError: If no loss has this name.
    """
    positive, other = gold & allowed, allowed & ~gold
    counted = positive.any(-1) & other.any(-1)  # [batch heads queries]
    if loss == "sum_hinge":
        negative = sample_negatives(positive, other, generator)
        row = margin + (distance * positive).sum(-1) - (distance * negative).sum(-1)
        return _mean(row.clamp_min(0.0), counted)
    if loss == "pair_hinge":
        return _mean(_pair_rows(distance, positive, other, margin, generator), counted)
    if loss == "logistic":
        near = (F.softplus(distance - margin) * positive).sum((-2, -1)) / positive.sum((-2, -1)).clamp_min(1)
        far = (F.softplus(margin - distance) * other).sum((-2, -1)) / other.sum((-2, -1)).clamp_min(1)
        both = positive.any(-1).any(-1) & other.any(-1).any(-1)  # [batch heads]
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
    """`projection_loss` with sum_hinge on squared distances, without the matrix of distances.

    With signs σ_ij of +1 for positives, −1 for negatives and 0 otherwise,

        Σ_j σ_ij ‖q_i − k_j‖² = ‖q_i‖² Σ_j σ_ij + Σ_j σ_ij ‖k_j‖² − 2 q_i · Σ_j σ_ij k_j

    so no gradient has the size queries × keys.

    Args:
        query: Projected queries.
        key: Projected keys.
        gold: Pairs with a positive entmax probability.
        allowed: Pairs that count.
        margin: ω.
        generator: Generator of the negatives; torch's default generator if omitted.
    """
    positive, other = gold & allowed, allowed & ~gold
    counted = positive.any(-1) & other.any(-1)  # [batch heads queries]
    sign = positive.to(query.dtype) - sample_negatives(positive, other, generator).to(query.dtype)
    # sign @ ‖k‖² is [batch heads queries 1]
    row = margin + sign.sum(-1) * query.square().sum(-1) + (sign @ key.square().sum(-1, keepdim=True))[..., 0]
    row = row - 2 * (query * (sign @ key)).sum(-1)
    return _mean(row.clamp_min(0.0), counted)


def sample_negatives(
    positive: Bool[Tensor, "batch heads queries keys"],
    other: Bool[Tensor, "batch heads queries keys"],
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch heads queries keys"]:
    """Sample as many other keys per query as it has positives, without replacement; all of them if there are fewer."""
    noise = _uniform(other, generator).masked_fill(~other, 2.0)
    wanted = torch.minimum(positive.sum(-1, keepdim=True), other.sum(-1, keepdim=True))  # [batch heads queries 1]
    smallest = noise.topk(max(1, int(wanted.max())), dim=-1, largest=False).values  # [batch heads queries most_wanted]
    last = smallest.gather(-1, (wanted - 1).clamp_min(0))  # [batch heads queries 1]
    return (noise <= last) & other & (wanted > 0)


def _pair_rows(
    distance: Tensor, positive: Tensor, other: Tensor, margin: float, generator: torch.Generator | None
) -> Tensor:
    """Mean hinge of each query over its positives, each against one sampled other key [batch heads queries]."""
    order = other.byte().sort(dim=-1, descending=True, stable=True).indices  # other keys first
    count = other.sum(-1, keepdim=True)  # [batch heads queries 1]
    chosen = (_uniform(distance, generator) * count).long()
    negative = distance.gather(-1, order.gather(-1, chosen.clamp_max((count - 1).clamp_min(0))))
    hinge = (margin + distance - negative).clamp_min(0.0) * positive
    return hinge.sum(-1) / positive.sum(-1).clamp_min(1)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) in the shape of a tensor, on its device; drawn on the device of the generator."""
    device = like.device if generator is None else generator.device
    # the same numbers on every device
    return torch.rand(like.shape, generator=generator, device=device).to(like.device)


def _mean(rows: Tensor, counted: Tensor) -> Tensor:
    """Mean over counted queries, then over the heads that have any."""
    per_head = (rows * counted).sum(-1) / counted.sum(-1).clamp_min(1)  # [batch heads]
    used = counted.any(-1)
    return (per_head * used).sum() / used.sum().clamp_min(1)
