"""Reference implementation of Linformer and causal linear attention: one sample, head and token after another.

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


def linear_attention(
    q: Float[Tensor, "tokens width"],
    k: Float[Tensor, "tokens width"],
    v: Float[Tensor, "tokens value_width"],
    m: Bool[Tensor, " tokens"],
    *,
    scale: float,
    window: int,
    w_q: Float[Tensor, "width features"] | None = None,
    w_k: Float[Tensor, "width features"] | None = None,
    gate: tuple[Float[Tensor, " width"], Float[Tensor, ""]] | None = None,
    balance: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "tokens value_width"]:
    """Compute causal attention of one head: softmax weights for the last `window` tokens, feature weights before.

    Source: LoLCATs, Zhang et al. 2025, equation 8, with decay Π α_t as in Yang et al. 2024. Differs: the learned factor
    is on the linear part.

    Args:
        q: Queries of one sequence.
        k: Keys.
        v: Values.
        m: True for valid tokens, at any index; other rows of the result are 0.
        scale: Factor on the scores.
        window: Number of tokens with softmax weights, 0 for none.
        w_q: Matrix of the softmax map of queries; None for elu(x) + 1.
        w_k: Matrix of the softmax map of keys.
        gate: Weight and bias of the forget gate.
        balance: Logarithm of the factor on feature weights.
    """

    def phi(x: Tensor, w: Tensor | None) -> Tensor:
        x = x * math.sqrt(scale)
        if w is None:
            return torch.where(x > 0, x + 1, torch.exp(x))
        return torch.cat([torch.softmax(x @ w, 0), torch.softmax(-(x @ w), 0)])

    rows: list[Tensor] = []
    for i in range(len(q)):
        near = [j for j in range(i + 1) if m[j] and j > i - window]
        far = [j for j in range(i + 1) if m[j] and j <= i - window]
        if not m[i]:
            rows.append(v.new_zeros(v.shape[1]))
            continue
        weights: dict[int, Tensor] = {}
        if near:
            scores = torch.stack([scale * q[i] @ k[j] for j in near])
            weights |= {j: torch.exp(s - scores.max()) for j, s in zip(near, scores, strict=True)}
        for j in far:
            weights[j] = phi(q[i], w_q) @ phi(k[j], w_k)
            if gate is not None:
                for t in (t for t in range(j + 1, i + 1) if m[t]):
                    weights[j] = weights[j] * torch.sigmoid(gate[0] @ v[t] + gate[1])
            if balance is not None:
                weights[j] = weights[j] * torch.exp(balance)
        total = torch.stack(list(weights.values())).sum()
        rows.append(torch.stack([w * v[j] for j, w in weights.items()]).sum(0) / total)
    return torch.stack(rows)
