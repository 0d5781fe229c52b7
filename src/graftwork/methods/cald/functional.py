"""Linformer attention on whole batches, in two orders of computation, and attention by a feature map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """Which tokens of a batch are compressed, in what order, and what the result is divided by.

    Row i of a compression matrix belongs to the i-th real token of a row of the batch, wherever it stands; so the
    result does not depend on how, and how much, a row is padded.

    Args:
        padding: True for real tokens; None if all are.
        tokens: Tokens of a row.
        positions: Rows of the compression matrices.
        on_long: "error", "truncate" or "interpolate", for rows with more real tokens than `positions`.

    Raises:
        ConfigError: If a row is longer than the matrices and `on_long` is "error".
    """

    padding: Bool[Tensor, "batch tokens"] | None
    tokens: int
    positions: int
    on_long: str = "error"

    def __post_init__(self) -> None:
        if self.on_long == "error" and self.tokens > self.positions:
            raise ConfigError(
                f"Found a sequence of {self.tokens} tokens, but the compression has {self.positions} positions. Cut "
                "the input, convert with more positions, or set on_long to truncate or interpolate."
            )

    @property
    def kept(self) -> int:
        """Tokens of a row that take part."""
        return min(self.tokens, self.positions) if self.on_long == "truncate" else self.tokens

    def compact(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """The real tokens of every row, moved to its front; zeros behind them."""
        if self.padding is None:
            return x[:, : self.kept]
        real = self.padding.to(x.dtype)[..., None]
        if not self._scattered():
            return (x * real)[:, : self.kept]
        rank = (self.padding.long().cumsum(1) - 1).clamp_min(0)
        # whatever is not real adds a zero to the first place
        moved = torch.zeros_like(x).scatter_add(1, rank[..., None].expand_as(x), x * real)
        return moved[:, : self.kept]

    def counts(self, x: Tensor) -> Float[Tensor, "batch_or_1 1 1"]:
        """Real tokens that take part in each row, at least 1."""
        if self.padding is None:
            return x.new_full((1, 1, 1), self.kept)
        return self.padding.sum(1).clamp(1, self.kept).to(x.dtype)[:, None, None]

    def rows(self, matrix: Float[Tensor, "*heads positions k"]) -> Tensor:
        """The rows of a compression matrix for these tokens; with a batch axis in front where it is stretched."""
        if self.tokens <= self.positions or self.on_long != "interpolate":
            return matrix[..., : self.kept, :]
        place = self._places(matrix)
        low = place.floor().long().clamp_max(self.positions - 1)
        high = (low + 1).clamp_max(self.positions - 1)
        share = (place - low)[..., None]
        if matrix.ndim == 3:
            share = share[:, None]
        lower, upper = (matrix[..., index, :] for index in (low, high))
        if matrix.ndim == 3:
            lower, upper = lower.transpose(0, 1), upper.transpose(0, 1)
        return lower + share * (upper - lower)

    def members(self, slots: Int[Tensor, " positions"], k: int, like: Tensor) -> Float[Tensor, "batch_or_1 1 k"]:
        """How many real tokens of each row stand on the starting positions of each slot."""
        if self.tokens <= self.positions or self.on_long != "interpolate":
            chosen = slots[: self.kept]
        else:
            chosen = slots[self._places(like).round().long()]
        member = (chosen[..., None] == torch.arange(k, device=slots.device)).to(like.dtype)
        ones = like.new_ones((1, self.tokens, 1))
        if self.padding is not None:
            ones = ones.expand(self.padding.shape[0], -1, -1)
        return self.compact(ones).mT @ member

    def _places(self, like: Tensor) -> Float[Tensor, "batch_or_1 tokens"]:
        """The (broken) row of the matrix for each token, when rows longer than the matrix are stretched."""
        count = self.counts(like)[..., 0]
        step = ((self.positions - 1) / (count - 1).clamp_min(1)).clamp_max(1.0)
        place = torch.arange(self.tokens, device=like.device, dtype=like.dtype)[None] * step
        return place.clamp_max(self.positions - 1)

    def _scattered(self) -> bool:
        """Whether a real token stands behind one that is not; under tracing, whether one may."""
        if self.padding is None:
            return False
        return torch.compiler.is_compiling() or bool((self.padding[:, 1:] & ~self.padding[:, :-1]).any())


@dataclass(frozen=True, eq=False)
class SlotRule:
    """What compressed tokens are divided by, and which slots are hidden from attention."""

    length_rule: str = "inv_sqrt"
    slots: Int[Tensor, " positions"] | None = None
    """Slot of each position at the start; needed by `slot_mean` and by `mask_empty`."""
    mask_empty: bool = False

    def divide(self, x: Float[Tensor, "batch *heads k width"], weights: TokenWeights) -> Tensor:
        """Compressed tokens, divided."""
        k = x.shape[-2]
        if self.length_rule == "inv_sqrt":
            divisor = weights.counts(x).sqrt()
        elif self.length_rule == "slot_mean" and self.slots is not None:
            divisor = weights.members(self.slots, k, x).clamp_min(1).mT
        else:
            return x
        return x / (divisor[:, None] if x.ndim == 4 else divisor)

    def mask(self, k: int, weights: TokenWeights, like: Tensor) -> Bool[Tensor, "batch_or_1 1 1 k"] | None:
        """True for the slots that may be attended to; all of them in a row without any token."""
        if not self.mask_empty or self.slots is None:
            return None
        full = weights.members(self.slots, k, like) > 0
        return (full | ~full.any(-1, keepdim=True))[:, None]


def compress(
    x: Float[Tensor, "batch tokens width"], matrix: Float[Tensor, "positions k"], weights: TokenWeights, rule: SlotRule
) -> Float[Tensor, "batch k width"]:
    """Combine the tokens of each row into k slots."""
    return rule.divide(weights.rows(matrix).mT @ weights.compact(x), weights)


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
    on_long: str = "error",
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens width"]:
    """Attend to keys and values that are compressed along the sequence: softmax(q (Eᵀ κ)ᵀ) (Fᵀ υ).

    Source: Wang et al. 2020, equation 7, with the length rule of He & Garner 2024; `reference.attention`.

    Args:
        query: Queries.
        key: Keys, biases included.
        value: Values, biases included.
        key_matrix: Compression of keys; with a leading axis, one for every head.
        value_matrix: Compression of values; may be the same tensor.
        scale: Factor on the scores.
        padding: True for real tokens, in any pattern; None if all are.
        rule: Length rule and hidden slots.
        on_long: What happens to sequences longer than the matrices.
        dropout: Rate at which probabilities [tokens × k] are dropped.

    Raises:
        ConfigError: If a sequence is longer than the matrices and `on_long` is "error".
    """
    rule = rule or SlotRule()
    heads = query.shape[1]
    weights = TokenWeights(padding, key.shape[2], key_matrix.shape[-2], on_long)
    compressed = []
    for matrix, tokens in ((key_matrix, key), (value_matrix, value)):
        joined = tokens.transpose(1, 2).flatten(2)
        if matrix.ndim == 2:
            slots = compress(joined, matrix, weights, rule).unflatten(2, (heads, -1)).transpose(1, 2)
        else:
            real = weights.compact(joined).unflatten(2, (heads, -1)).transpose(1, 2)
            slots = rule.divide(weights.rows(matrix).mT @ real, weights)
        compressed.append(slots)
    mask = rule.mask(key_matrix.shape[-1], weights, query)
    return F.scaled_dot_product_attention(query, *compressed, attn_mask=mask, dropout_p=dropout, scale=scale)


def compressed_attention(
    query: Float[Tensor, "batch heads tokens width"],
    hidden: Float[Tensor, "batch tokens hidden"],
    key_parts: Callable[[Tensor], tuple[Tensor, Tensor]],
    value_parts: Callable[[Tensor], tuple[Tensor, Tensor]],
    key_matrix: Float[Tensor, "positions k"],
    value_matrix: Float[Tensor, "positions k"],
    *,
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None = None,
    rule: SlotRule | None = None,
    on_long: str = "error",
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens width"]:
    """Compute `projected_attention` with hidden states compressed first, so keys and values exist for k slots only.

    With slots X̃ = Eᵀ(a·h) and their weights s = Eᵀ a, the compressed keys are X̃ W + s ⊗ b: the bias counts as often as
    tokens went into the slot.

    Source: Wang et al. 2020; the authors of Linformer compress first too, without the s ⊗ b, which their layers lack.

    Args:
        query: Queries.
        hidden: Input of the layer.
        key_parts: Maps slots to (slots · weight, bias) of the key projection.
        value_parts: The same of the value projection.
        key_matrix: Compression of keys.
        value_matrix: Compression of values; if it is the same tensor, compressing is done once.
        scale: Factor on the scores.
        padding: True for real tokens, in any pattern; None if all are.
        rule: Length rule and hidden slots.
        on_long: What happens to sequences longer than the matrices.
        dropout: Rate at which probabilities are dropped.

    Raises:
        ConfigError: If a sequence is longer than the matrices and `on_long` is "error".
    """
    rule = rule or SlotRule()
    heads = query.shape[1]
    weights = TokenWeights(padding, hidden.shape[1], key_matrix.shape[-2], on_long)
    ones = hidden.new_ones((hidden.shape[0] if padding is not None else 1, hidden.shape[1], 1))
    slots = shares = None
    results = []
    for matrix, parts in ((key_matrix, key_parts), (value_matrix, value_parts)):
        if slots is None or shares is None or matrix is not key_matrix:
            slots, shares = compress(hidden, matrix, weights, rule), compress(ones, matrix, weights, rule)
        linear, bias = parts(slots)
        joined = linear + shares * bias
        results.append(joined.unflatten(2, (heads, -1)).transpose(1, 2))
    mask = rule.mask(key_matrix.shape[-1], weights, query)
    return F.scaled_dot_product_attention(query, *results, attn_mask=mask, dropout_p=dropout, scale=scale)


def feature_map_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch heads tokens width"],
    value: Float[Tensor, "batch heads tokens width"],
    *,
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens width"]:
    """Attend without a softmax: φ(q) Σ φ(k)ᵀ v / φ(q) Σ φ(k)ᵀ, with φ = elu + 1.

    Linear in the number of tokens, for any length; padding is left out exactly.

    Source: Katharopoulos et al. 2020, equations 5 and 7.
    Differs from it: queries and keys share the scale of dense attention, and a row without tokens yields zeros.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        scale: Factor on the scores of dense attention; its root goes to either side.
        padding: True for real tokens; None if all are.
    """
    q, k = (F.elu(side * scale**0.5) + 1 for side in (query, key))
    if padding is not None:
        k = k * padding[:, None, :, None].to(k.dtype)
    total = k.sum(2)[..., None]
    # φ is positive, so only a row without any token has a sum of 0
    smallest = torch.finfo(q.dtype).tiny
    return (q @ (k.mT @ value)) / (q @ total).clamp_min(smallest)
