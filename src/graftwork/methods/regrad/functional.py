"""ReGrad's formulas on tensors: row-wise low-rank product, per-example gradients, row losses and the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED_LABEL = -100
"""Label of positions without a loss."""


def low_rank(
    x: Float[Tensor, "rows tokens inputs"],
    lora_a: Float[Tensor, "*rows rank inputs"],
    lora_b: Float[Tensor, "*rows outputs rank"],
    scaling: float,
) -> Float[Tensor, "rows tokens outputs"]:
    """Low-rank term of an adapted projection: s · x Aᵀ Bᵀ, with one pair (A, B) for all rows or one pair per row.

    Args:
        x: Inputs of the projection.
        lora_a: A, shared or per row.
        lora_b: B, shared or per row.
        scaling: s, the scale of the product.
    """
    # [rows tokens inputs] @ [*rows inputs rank] -> [rows tokens rank]; @ [*rows rank outputs] -> [rows tokens outputs]
    # not .mT, which the TorchScript exporter of ONNX does not know
    return (x @ lora_a.transpose(-1, -2)) @ lora_b.transpose(-1, -2) * scaling


def add_low_rank(
    output: Float[Tensor, "rows tokens outputs"],
    x: Float[Tensor, "rows tokens inputs"],
    lora_a: Float[Tensor, "*rows rank inputs"],
    lora_b: Float[Tensor, "*rows outputs rank"],
    scaling: float,
) -> Float[Tensor, "rows tokens outputs"]:
    """Output of a projection with its low-rank term, y + s · x Aᵀ Bᵀ, without a tensor for the term.

    Args:
        output: y, in the type of the matrices.
        x: Inputs of the projection.
        lora_a: A, shared or per row.
        lora_b: B, shared or per row.
        scaling: s, the scale of the product.
    """
    inner = x @ lora_a.transpose(-1, -2)  # [rows tokens rank]
    if lora_b.ndim == 3:
        # [rows tokens rank] @ [rows rank outputs]
        return torch.baddbmm(output, inner, lora_b.transpose(-1, -2), alpha=scaling)
    # all leading dimensions as one: [rows*tokens rank] @ [rank outputs]
    flat = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), lora_b.transpose(-1, -2), alpha=scaling)
    return flat.view(output.shape)


def per_example_gradients(
    x: Float[Tensor, "rows tokens inputs"],
    output_gradients: Float[Tensor, "rows tokens outputs"],
    lora_a: Float[Tensor, "rank inputs"],
    lora_b: Float[Tensor, "outputs rank"],
    scaling: float,
) -> tuple[Float[Tensor, "rows rank inputs"], Float[Tensor, "rows outputs rank"]]:
    """Gradient of each row's loss L_r with respect to a low-rank pair shared by all rows.

    With y = W x + s B A x and δ_t = ∂(Σ_r L_r)/∂y_t, for each row:

        ∂L_r/∂A = s · Σ_t (Bᵀ δ_t) x_tᵀ        ∂L_r/∂B = s · Σ_t δ_t (A x_t)ᵀ

    This is exact, because a row's loss depends on no other row's outputs. Positions with δ_t = 0, such as padding,
    contribute nothing.

    Source: ReGrad's document gradient, written out for a linear layer.

    Args:
        x: Inputs x of the projection.
        output_gradients: Gradients δ of the summed row losses with respect to the projection's outputs.
        lora_a: A.
        lora_b: B.
        scaling: s, the scale of the product.

    Returns:
        Gradients of A and of B, for each row.
    """
    # [rows tokens outputs] @ [outputs rank] -> [rows tokens rank]; transposed @ [rows tokens inputs]
    gradient_a = (output_gradients @ lora_b).mT @ x  # [rows rank inputs]
    # [rows outputs tokens] @ [rows tokens rank]
    gradient_b = output_gradients.mT @ (x @ lora_a.mT)  # [rows outputs rank]
    return gradient_a * scaling, gradient_b * scaling


def mean_token_losses(
    logits: Float[Tensor, "rows tokens vocabulary"], labels: Int[Tensor, "rows tokens"]
) -> Float[Tensor, " rows"]:
    """Mean next-token loss of each row: L_r = −1/|T_r| Σ_{t ∈ T_r} log p(x_t | x_<t), and 0 for an empty T_r.

    T_r are the row's labelled positions except the first one. Computed in float32 or wider.

    Args:
        logits: Output of the model; position t predicts token t + 1.
        labels: Token ids, with `IGNORED_LABEL` at positions without a loss.
    """
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))  # [rows tokens-1 vocabulary]
    targets = labels[:, 1:]  # [rows tokens-1]
    losses = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1),  # [rows*(tokens-1) vocabulary]
        targets.flatten(),  # [rows*(tokens-1)]
        ignore_index=IGNORED_LABEL,
        reduction="none",
    ).view(targets.shape)  # [rows tokens-1]
    return losses.sum(-1) / (targets != IGNORED_LABEL).sum(-1).clamp_min(1)  # [rows]


def head_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "rows tokens hidden"],
    labels: Int[Tensor, "rows tokens"],
    together: int,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows tokens hidden"]]:
    """Mean next-token losses L_r of an output layer, and the gradient of Σ_r L_r with respect to its input.

    Equal to `mean_token_losses` of all logits and its gradient. The logits of `together` tokens exist at a time, and
    are differentiated at once.

    Args:
        head: Output layer: hidden states to logits.
        hidden: Its input; detached inside.
        labels: Token ids, with `IGNORED_LABEL` at positions without a loss.
        together: Number of tokens whose logits are computed at a time.

    Returns:
        Detached losses, and the gradient in the type of `hidden`.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # [rows tokens]
    weights = 1 / (targets != IGNORED_LABEL).sum(-1).clamp_min(1)  # [rows]
    flat = hidden.detach().flatten(0, 1)  # [rows*tokens hidden]
    own = weights[:, None].expand_as(targets).flatten()  # [rows*tokens]
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    aims = targets.flatten()  # [rows*tokens]
    with torch.enable_grad():
        for start in range(0, len(flat), together):
            part = slice(start, start + together)
            target, weight = aims[part], own[part]
            leaf = flat[part].detach().requires_grad_()
            logits = head(leaf)  # [tokens vocabulary]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = torch.nn.functional.cross_entropy(wide, target, ignore_index=IGNORED_LABEL, reduction="none")
            gradients += torch.autograd.grad(loss, leaf, weight.to(loss))
            losses.append(loss.detach())
    rows = torch.cat(losses).view(targets.shape).sum(-1) * weights.to(losses[0])  # [rows]
    return rows, torch.cat(gradients).view(hidden.shape)


def document_labels(
    input_ids: Int[Tensor, "rows tokens"], attention_mask: Int[Tensor, "rows tokens"]
) -> Int[Tensor, "rows tokens"]:
    """Labels of plain text: the token ids, with padding ignored."""
    return input_ids.where(attention_mask.bool(), IGNORED_LABEL)


def update(
    step_sizes: Float[Tensor, " numbers"],
    gradients: Float[Tensor, "rows numbers"],
    strength: float | Float[Tensor, " rows"] = 1.0,
) -> Float[Tensor, "rows numbers"]:
    """Change of the adapter by one gradient step: Δ_r = −γ_r · α ⊙ Σ_d g_d.

    Args:
        step_sizes: α, the learned step sizes.
        gradients: Σ_d g_d, the sum over each row's passages d.
        strength: γ, one for all rows or one per row; 0 leaves the adapter unchanged.
    """
    if isinstance(strength, Tensor):
        strength = strength.to(gradients)[:, None]  # [rows 1]
    return -strength * step_sizes.to(gradients) * gradients  # [rows numbers]


def mask_rows(
    lora_b: Float[Tensor, "rows outputs rank"], off: Bool[Tensor, " rows"]
) -> Float[Tensor, "rows outputs rank"]:
    """Set B to zero in rows whose adapter is off."""
    return lora_b.masked_fill(off[:, None, None], 0.0)  # off: [rows 1 1]


def norms(x: Float[Tensor, "*rows numbers"]) -> Float[Tensor, "*rows"]:
    """Return Euclidean norms over the last dimension."""
    return cast(Tensor, torch.linalg.vector_norm(x, dim=-1))  # pyright: ignore[reportUnknownMemberType]
