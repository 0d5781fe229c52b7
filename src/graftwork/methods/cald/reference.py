"""Reference implementation of Linformer attention: one sample, one head and one token after another.

The tests compare the fast forms of `functional` with it. Nothing is vectorised over samples or heads.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def compressed(
    x: Float[Tensor, "tokens width"],
    e: Float[Tensor, "positions k"],
    m: Bool[Tensor, " tokens"],
    length_rule: str,
    slots: Int[Tensor, " positions"] | None = None,
) -> Float[Tensor, "k width"]:
    """Compute X̃ = Σ_i E_i ⊗ x_i over the valid tokens, with row i of E for the i-th valid token, by the length rule.

    Source: He & Garner 2024 with `linformer/…/attention` of the authors' code: K̃ = (E[:L]ᵀ κ[:L]) / √L. Differs: tokens
    are counted by the mask instead of taken from the front, and L is at least 1.

    Args:
        x: Tokens of one sample.
        e: Compression matrix E.
        m: True for valid tokens.
        length_rule: Divisor: "inv_sqrt" √L, "slot_mean" the number of tokens of a slot, or "none".
        slots: Initial slot of each position, for "slot_mean".
    """
    total = x.new_zeros(e.shape[1], x.shape[1])
    rank = 0
    for i in range(len(x)):
        if m[i]:
            total = total + torch.outer(e[rank], x[i])
            rank += 1
    if length_rule == "inv_sqrt":
        return total / math.sqrt(max(1, rank))
    if length_rule == "slot_mean" and slots is not None:
        counts = [max(1, sum(int(slots[i]) == j for i in range(rank))) for j in range(e.shape[1])]
        return total / torch.tensor(counts, dtype=x.dtype)[:, None]
    return total


def attention(
    h: Float[Tensor, "tokens hidden"],
    weights: dict[str, tuple[Tensor, Tensor]],
    e: Float[Tensor, "*heads positions k"],
    f: Float[Tensor, "*heads positions k"],
    m: Bool[Tensor, " tokens"],
    heads: int,
    length_rule: str = "inv_sqrt",
    slots: Int[Tensor, " positions"] | None = None,
    mask_empty_slots: bool = False,
) -> Float[Tensor, "tokens hidden"]:
    """Compute softmax(q K̃ᵀ/√d_h) Ṽ for every head of one sample; the softmax runs over the k slots.

    Args:
        h: Input of the layer.
        weights: "query", "key" and "value" to (matrix [out in], bias).
        e: Compression matrix E of keys; a leading axis has one matrix per head.
        f: Compression matrix F of values.
        m: True for valid tokens, at any index.
        heads: Number of heads.
        length_rule: "inv_sqrt", "slot_mean" or "none".
        slots: Initial slot of each position, for "slot_mean" and `mask_empty_slots`.
        mask_empty_slots: Mask slots without a valid token at their initial positions.
    """
    q, kappa, upsilon = (h @ weights[name][0].T + weights[name][1] for name in ("query", "key", "value"))
    width = q.shape[1] // heads
    valid = int(m.sum())
    outputs: list[Tensor] = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        e_h, f_h = (e[head], f[head]) if e.ndim == 3 else (e, f)
        keys = compressed(kappa[:, part], e_h, m, length_rule, slots)
        values = compressed(upsilon[:, part], f_h, m, length_rule, slots)
        rows: list[Tensor] = []
        for i in range(len(h)):
            score = (keys @ q[i, part]) / math.sqrt(width)  # [k]
            if mask_empty_slots and slots is not None and valid > 0:
                full = torch.zeros(len(score), dtype=torch.bool)
                full[slots[:valid]] = True
                score = score.masked_fill(~full, -math.inf)
            rows.append(torch.softmax(score, dim=-1) @ values)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=-1)
