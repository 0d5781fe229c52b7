"""Linformer attention on batches, in two orders of computation, and feature-map attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.cald.config import LengthRule, OnLong
from graftwork.surgery.precision import compute_dtype
from graftwork.surgery.tracing import tracing

AffineParts = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Affine projection of slots [batch k hidden], as (slots · weight [batch k width], bias [width])."""


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """Assignment of the real tokens of a batch to the rows of a compression matrix.

    Row i of the matrix belongs to the i-th real token of a sequence, at whatever index, so the result does not depend
    on the amount or side of padding.

    Args:
        padding: True for real tokens; None if there is no padding.
        tokens: Sequence length of the batch.
        positions: Number of rows of the compression matrices.
        on_long: Handling of sequences longer than `positions`.

    Raises:
        ConfigError: If a sequence is longer than the matrices and `on_long` is "error".
    """

    padding: Bool[Tensor, "batch tokens"] | None
    tokens: int
    positions: int
    on_long: OnLong = "error"

    def __post_init__(self) -> None:
        if self.on_long == "error" and self.tokens > self.positions:
            raise ConfigError(
                f"Found a sequence of {self.tokens} tokens. Expected at most {self.positions}, the number of positions "
                "of the compression. Shorten the input, convert with more positions, or set on_long to truncate or "
                "interpolate."
            )

    @property
    def kept(self) -> int:
        """Number of tokens of a sequence that are compressed."""
        return min(self.tokens, self.positions) if self.on_long == "truncate" else self.tokens

    def compact(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """Move the real tokens of every sequence to its front, followed by zeros."""
        if self.padding is None:
            return x[:, : self.kept]
        real = self.padding.to(x.dtype)[..., None]  # [batch, tokens, 1] broadcast to [batch, tokens, width]
        if not self._scattered():
            return (x * real)[:, : self.kept]
        rank = (self.padding.long().cumsum(1) - 1).clamp_min(0)  # [batch, tokens]
        # padding adds a zero to the token before it
        moved = torch.zeros_like(x).scatter_add(1, rank[..., None].expand_as(x), x * real)  # [batch, tokens, width]
        return moved[:, : self.kept]

    def counts(self, x: Shaped[Tensor, ...]) -> Float[Tensor, "batch_or_1 1 1"]:
        """Return the number of compressed tokens of each sequence, at least 1, in at least float32.

        Half precision counts to 256 (bfloat16) or 2,048 (float16) only.
        """
        dtype = compute_dtype(x.dtype)
        if self.padding is None:
            return x.new_full((1, 1, 1), self.kept, dtype=dtype)
        return self.padding.sum(1).clamp(1, self.kept).to(dtype)[:, None, None]  # [batch] → [batch, 1, 1]

    def rows(self, matrix: Float[Tensor, "*heads positions k"]) -> Float[Tensor, "*batch_heads kept k"]:
        """Return the rows of a compression matrix for these tokens; per batch element if they are interpolated."""
        if self.tokens <= self.positions or self.on_long != "interpolate":
            return matrix[..., : self.kept, :]  # [*heads, kept, k]
        place = self._places(matrix)  # [batch or 1, tokens]
        low = place.floor().long().clamp_max(self.positions - 1)
        high = (low + 1).clamp_max(self.positions - 1)
        share = (place - low)[..., None]  # [batch or 1, tokens, 1]
        if matrix.ndim == 3:
            share = share[:, None]  # [batch or 1, 1, tokens, 1]
        share = share.to(matrix.dtype)
        lower, upper = matrix[..., low, :], matrix[..., high, :]  # [*heads, batch or 1, tokens, k]
        if matrix.ndim == 3:
            lower, upper = lower.transpose(0, 1), upper.transpose(0, 1)  # [batch or 1, heads, tokens, k]
        return lower + share * (upper - lower)

    def members(
        self, slots: Int[Tensor, " positions"], k: int, like: Shaped[Tensor, ...]
    ) -> Float[Tensor, "batch_or_1 1 k"]:
        """Count the real tokens at the initial positions of each slot.

        Args:
            slots: Slot of each position.
            k: Number of slots.
            like: Tensor whose device the result has; counts are in at least its dtype and float32.
        """
        if self.tokens <= self.positions or self.on_long != "interpolate":
            chosen = slots[: self.kept]  # [kept]
        else:
            chosen = slots[self._places(like).round().long()]  # [batch or 1, tokens]
        dtype = compute_dtype(like.dtype)
        member = (chosen[..., None] == torch.arange(k, device=slots.device)).to(dtype)  # […, tokens, k]
        ones = like.new_ones((1, self.tokens, 1), dtype=dtype)
        if self.padding is not None:
            ones = ones.expand(self.padding.shape[0], -1, -1)  # [batch, tokens, 1]
        return self.compact(ones).mT @ member  # [batch or 1, 1, kept] · […, kept, k]

    def _places(self, like: Tensor) -> Float[Tensor, "batch_or_1 tokens"]:
        """Fractional matrix row of each token, if sequences longer than the matrix are interpolated."""
        count = self.counts(like)[..., 0]  # [batch or 1, 1]
        step = ((self.positions - 1) / (count - 1).clamp_min(1)).clamp_max(1.0)
        place = torch.arange(self.tokens, device=like.device, dtype=step.dtype)[None] * step  # [batch or 1, tokens]
        return place.clamp_max(self.positions - 1)

    def _scattered(self) -> bool:
        """True if padding precedes a real token, or may do so: under tracing, and on an accelerator."""
        if self.padding is None:
            return False
        return (
            tracing() or self.padding.device.type != "cpu" or bool((self.padding[:, 1:] & ~self.padding[:, :-1]).any())
        )


@dataclass(frozen=True, eq=False)
class SlotRule:
    """Divisor of compressed tokens, and mask of empty slots."""

    length_rule: LengthRule = "inv_sqrt"
    slots: Int[Tensor, " positions"] | None = None
    """Initial slot of each position; required by `slot_mean` and `mask_empty`."""
    mask_empty: bool = False
    """Mask slots without a real token at their initial positions."""

    def product(
        self,
        matrix: Float[Tensor, "*heads positions k"],
        x: Float[Tensor, "batch *heads kept width"],
        weights: TokenWeights,
    ) -> Float[Tensor, "batch *heads k width"]:
        """Compute Eᵀ X, divided by √L (inv_sqrt) or by the number of tokens of each slot (slot_mean).

        In float16, whose largest number is 65,504, tokens are divided by √L before they are added.

        Args:
            matrix: Compression matrix E.
            x: Real tokens of each sequence, at its front.
            weights: Tokens of the batch.
        """
        rows = weights.rows(matrix).mT  # [*heads, k, kept]
        root = weights.counts(x).sqrt()  # [batch or 1, 1, 1]
        if self.length_rule == "inv_sqrt":
            divisor = root
        elif self.length_rule == "slot_mean" and self.slots is not None:
            divisor = weights.members(self.slots, rows.shape[-2], x).clamp_min(1).mT  # [batch or 1, k, 1]
        else:
            return rows @ x
        if x.ndim == 4:
            root, divisor = root[:, None], divisor[:, None]  # a heads axis of 1
        if x.dtype == torch.float16:
            return (rows @ (x / root).to(x.dtype)) * (root / divisor).to(x.dtype)
        return (rows @ x / divisor).to(x.dtype)

    def mask(self, k: int, weights: TokenWeights, like: Shaped[Tensor, ...]) -> Bool[Tensor, "batch_or_1 1 1 k"] | None:
        """Return True for the slots that can be attended to: non-empty ones, or all in a sequence without real tokens.

        Args:
            k: Number of slots.
            weights: Tokens of the batch.
            like: Tensor with the dtype and device to compute in.
        """
        if not self.mask_empty or self.slots is None:
            return None
        full = weights.members(self.slots, k, like) > 0  # [batch or 1, 1, k]
        return (full | ~full.any(-1, keepdim=True))[:, None]  # [batch or 1, 1, 1, k]


def compress(
    x: Float[Tensor, "batch tokens width"], matrix: Float[Tensor, "positions k"], weights: TokenWeights, rule: SlotRule
) -> Float[Tensor, "batch k width"]:
    """Combine the tokens of each sequence into k slots: X̃ = Eᵀ X, divided by the length rule."""
    # [k, kept] · [batch, kept, width] → [batch, k, width]
    return rule.product(matrix, weights.compact(x), weights)


def projected_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch heads tokens width"],
    value: Float[Tensor, "batch heads tokens width"],
    key_matrix: Float[Tensor, "*heads positions k"],
    value_matrix: Float[Tensor, "*heads positions k"],
    *,
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None = None,
    rule: SlotRule | None = None,
    on_long: OnLong = "error",
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens width"]:
    """Attend to keys and values compressed along the sequence: softmax(scale · q K̃ᵀ) Ṽ.

    K̃ = Eᵀ κ / √L and Ṽ = Fᵀ υ / √L, with L real tokens and the length rule inv_sqrt.

    Source: Wang et al. 2020, equation 7, with the length rule of He & Garner 2024; `reference.attention`.

    Args:
        query: Queries q.
        key: Keys κ, including biases.
        value: Values υ, including biases.
        key_matrix: Compression matrix E of keys; a leading axis has one matrix per head.
        value_matrix: Compression matrix F of values; may be the same tensor.
        scale: Factor on the scores.
        padding: True for real tokens, in any pattern; None if there is no padding.
        rule: Length rule and mask of empty slots.
        on_long: Handling of sequences longer than the matrices.
        dropout: Dropout rate of the probabilities [batch heads tokens k].

    Raises:
        ConfigError: If a sequence is longer than the matrices and `on_long` is "error".
    """
    rule = rule or SlotRule()
    heads = query.shape[1]
    weights = TokenWeights(padding, key.shape[2], key_matrix.shape[-2], on_long)
    compressed: list[Tensor] = []
    for matrix, tokens in ((key_matrix, key), (value_matrix, value)):
        joined = tokens.transpose(1, 2).flatten(2)  # [batch, tokens, heads·width]
        if matrix.ndim == 2:
            slots = split_heads(compress(joined, matrix, weights, rule), heads)  # [batch, heads, k, width]
        else:
            real = split_heads(weights.compact(joined), heads)  # [batch, heads, kept, width]
            # [heads, k, kept] · [batch, heads, kept, width] → [batch, heads, k, width]
            slots = rule.product(matrix, real, weights)
        compressed.append(slots)
    mask = rule.mask(key_matrix.shape[-1], weights, query)
    key, value = compressed
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def compressed_attention(
    query: Float[Tensor, "batch heads tokens width"],
    hidden: Float[Tensor, "batch tokens hidden"],
    key_parts: AffineParts,
    value_parts: AffineParts,
    key_matrix: Float[Tensor, "positions k"],
    value_matrix: Float[Tensor, "positions k"],
    *,
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None = None,
    rule: SlotRule | None = None,
    on_long: OnLong = "error",
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens width"]:
    """Compute `projected_attention` from compressed hidden states, so that keys and values exist for k slots only.

    With compressed hidden states X̃ = Eᵀ h / √L and slot weights s = Eᵀ 1 / √L, the compressed keys of a projection
    κ = h W + b are K̃ = X̃ W + s ⊗ b: each slot contains the bias with the total weight of its tokens.

    Source: Wang et al. 2020; the authors of Linformer compress first too, without s ⊗ b, because their projections have
    no bias.

    Args:
        query: Queries.
        hidden: Input of the layer.
        key_parts: Key projection.
        value_parts: Value projection.
        key_matrix: Compression matrix E of keys.
        value_matrix: Compression matrix F of values; if it is the same tensor, hidden states are compressed once.
        scale: Factor on the scores.
        padding: True for real tokens, in any pattern; None if there is no padding.
        rule: Length rule and mask of empty slots.
        on_long: Handling of sequences longer than the matrices.
        dropout: Dropout rate of the probabilities [batch heads tokens k].

    Raises:
        ConfigError: If a sequence is longer than the matrices and `on_long` is "error".
    """
    rule = rule or SlotRule()
    heads = query.shape[1]
    weights = TokenWeights(padding, hidden.shape[1], key_matrix.shape[-2], on_long)
    ones = hidden.new_ones((hidden.shape[0] if padding is not None else 1, hidden.shape[1], 1))
    slots = shares = None
    results: list[Tensor] = []
    for matrix, parts in ((key_matrix, key_parts), (value_matrix, value_parts)):
        if slots is None or shares is None or matrix is not key_matrix:
            slots = compress(hidden, matrix, weights, rule)  # X̃, [batch, k, hidden]
            shares = compress(ones, matrix, weights, rule)  # s, [batch or 1, k, 1]
        linear, bias = parts(slots)  # [batch, k, heads·width], [heads·width]
        results.append(split_heads(linear + shares * bias, heads))  # [batch, heads, k, width]
    mask = rule.mask(key_matrix.shape[-1], weights, query)
    key, value = results
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def softmax_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch heads tokens width"],
    value: Float[Tensor, "batch heads tokens width"],
    *,
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens width"]:
    """Compute the dense attention of an encoder that a mixer replaces; a row without real keys attends to all.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        scale: Factor on the scores.
        padding: True for real tokens; None if there is no padding.
        dropout: Dropout rate of the probabilities.
    """
    mask = None if padding is None else (padding | ~padding.any(1, keepdim=True))[:, None, None]  # [batch 1 1 tokens]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def split_heads(
    joined: Float[Tensor, "batch tokens heads_width"], heads: int
) -> Float[Tensor, "batch heads tokens width"]:
    """Split the last axis into heads and move them before the tokens."""
    batch, tokens, width = joined.shape
    return joined.view(batch, tokens, heads, width // heads).transpose(1, 2)  # [batch, heads, tokens, width]


def feature_map_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch heads tokens width"],
    value: Float[Tensor, "batch heads tokens width"],
    *,
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens width"]:
    """Attend without a softmax: o_i = φ(q_i) Σ_j φ(k_j)ᵀ v_j / (φ(q_i) Σ_j φ(k_j)ᵀ), with φ(x) = elu(x) + 1.

    Linear in the number of tokens, without a maximum length; padding is excluded exactly.

    Source: Katharopoulos et al. 2020, equations 5 and 7.
    Differs from it: queries and keys are multiplied by √scale each, and a sequence without real tokens yields zeros.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        scale: Factor on the scores of dense attention.
        padding: True for real tokens; None if there is no padding.
    """
    q, k = (F.elu(side * scale**0.5) + 1 for side in (query, key))
    if padding is not None:
        k = k * padding[:, None, :, None].to(k.dtype)  # [batch, 1, tokens, 1] broadcast over heads and width
    total = k.sum(2)[..., None]  # [batch, heads, width, 1]
    # φ is positive, so the sum is 0 only in a sequence without real tokens
    smallest = torch.finfo(q.dtype).tiny
    # [batch, heads, tokens, width] · [batch, heads, width, width] / [batch, heads, tokens, 1]
    return (q @ (k.mT @ value)) / (q @ total).clamp_min(smallest)
