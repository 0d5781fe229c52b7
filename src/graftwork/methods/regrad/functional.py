"""ReGrad on tensors: the row-specific low-rank product, per-example gradients, losses of rows, and the update."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED_LABEL = -100


def low_rank(
    x: Float[Tensor, "rows tokens inputs"],
    lora_a: Float[Tensor, "*rows rank inputs"],
    lora_b: Float[Tensor, "*rows outputs rank"],
    scaling: float,
) -> Float[Tensor, "rows tokens outputs"]:
    """What a low-rank pair adds to a projection's output; each row of the batch may have a pair of its own.

    Args:
        x: Inputs of the projection.
        lora_a: One matrix for all rows, or one for each.
        lora_b: Likewise.
        scaling: Factor of the product.
    """
    return (x @ lora_a.mT) @ lora_b.mT * scaling


def per_example_gradients(
    x: Float[Tensor, "rows tokens inputs"],
    output_gradients: Float[Tensor, "rows tokens outputs"],
    lora_a: Float[Tensor, "rank inputs"],
    lora_b: Float[Tensor, "outputs rank"],
    scaling: float,
) -> tuple[Float[Tensor, "rows rank inputs"], Float[Tensor, "rows outputs rank"]]:
    """The gradient of every row's own loss with respect to one low-rank pair that all rows share.

    Exact, because a row's loss depends on its own outputs alone. Positions whose output gradient is zero, as behind
    padding, add nothing.

    Source: ReGrad's document gradient, written out for a linear layer.

    Args:
        x: Inputs of the projection.
        output_gradients: Gradients of the sum of all rows' losses with respect to the projection's outputs.
        lora_a: First matrix of the pair.
        lora_b: Second one.
        scaling: Factor of the product.

    Returns:
        Gradients of both matrices, for each row.
    """
    gradient_a = (output_gradients @ lora_b).mT @ x
    gradient_b = output_gradients.mT @ (x @ lora_a.mT)
    return gradient_a * scaling, gradient_b * scaling


def mean_token_losses(
    logits: Float[Tensor, "rows tokens vocabulary"], labels: Int[Tensor, "rows tokens"]
) -> Float[Tensor, " rows"]:
    """Cross-entropy of the next token, averaged over each row's own labelled tokens; 0 for a row that has none.

    Args:
        logits: What the model said at each position; computed on in 32 bits at least.
        labels: The tokens themselves, `IGNORED_LABEL` where nothing is learned.
    """
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view(targets.shape)
    return losses.sum(-1) / (targets != IGNORED_LABEL).sum(-1).clamp_min(1)


def document_labels(
    input_ids: Int[Tensor, "rows tokens"], attention_mask: Int[Tensor, "rows tokens"]
) -> Int[Tensor, "rows tokens"]:
    """Labels of plain text: every token but padding, and so every one but the first is predicted."""
    return input_ids.where(attention_mask.bool(), IGNORED_LABEL)


def update(
    step_sizes: Float[Tensor, " numbers"],
    gradients: Float[Tensor, "rows numbers"],
    strength: float | Float[Tensor, " rows"] = 1.0,
) -> Float[Tensor, "rows numbers"]:
    """What is added to the adapter after one gradient step: minus strength × step size × summed gradients.

    Args:
        step_sizes: Learned step sizes.
        gradients: The sum over a row's passages.
        strength: Factor of the whole step, one for all rows or one for each; 0 leaves the adapter as it is.
    """
    if isinstance(strength, Tensor):
        strength = strength.to(gradients)[:, None]
    return -strength * step_sizes.to(gradients) * gradients


def switched(lora_b: Float[Tensor, "rows outputs rank"], off: Bool[Tensor, " rows"]) -> Tensor:
    """Second matrices that add nothing in the rows that are off."""
    return lora_b.masked_fill(off[:, None, None], 0.0)


def norms(x: Float[Tensor, "*rows numbers"]) -> Float[Tensor, "*rows"]:
    """Return Euclidean norms over the last dimension."""
    return cast(Tensor, torch.linalg.vector_norm(x, dim=-1))  # pyright: ignore[reportUnknownMemberType]
