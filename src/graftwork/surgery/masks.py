"""Lazy masks and position biases, evaluated for blocks of queries.

An attention layer with memory n·k must not receive an n·m mask, so the attention function receives an object that
builds any block of rows on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.tracing import tracing

MaskPredicate = Callable[..., Any]
"""Maps broadcastable index tensors (batch, head, query, key) to True where attention is allowed."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MaskRequest:
    """Arguments of one call of a mask function, and the masks of other attention implementations for them."""

    arguments: Mapping[str, Any]
    """Arguments of the call, by name."""
    masks: dict[str | None, Any]
    """Masks that were created so far, by attention implementation; shared by all copies of a lazy mask."""


@dataclass(frozen=True, slots=True, eq=False)
class LazyMask:
    """Attention mask as a description: allowed[b, h, q, k] = causal ∧ padding ∧ predicate, evaluated on demand.

    Source: `transformers.masking_utils`; its mask functions receive the same parts.
    """

    batch: int
    """Number of rows."""
    queries: int
    """Number of queries."""
    keys: int
    """Number of keys."""
    causal: bool = False
    """True if query r attends only to keys k with k + key_offset ≤ r + query_offset."""
    query_offset: int = 0
    """Absolute position of query 0; with a cache, the number of cached tokens."""
    key_offset: int = 0
    """Absolute position of key 0; above 0 in the rolling cache of sliding-window attention."""
    padding: Bool[Tensor, "batch keys"] | None = None
    """True for real tokens, aligned with the keys; None if every key is real."""
    first: Int[Tensor, " batch"] | None = None
    """Absolute position of each row's first real token, if a rolling cache has dropped it from `padding`."""
    predicate: MaskPredicate | None = None
    """Further pattern (sliding window, packed rows) on absolute positions; None if there is none."""
    vectorised: bool = False
    """True if the predicate takes scalars and must be vectorised by vmap, as user-supplied predicates do."""
    request: MaskRequest | None = None
    """Call of transformers that this mask answers; None for a mask that was built otherwise."""

    @property
    def ndim(self) -> int:
        """4; transformers reads it to recognise a prepared mask."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense mask, (batch, 1, queries, keys)."""
        return (self.batch, 1, self.queries, self.keys)

    def starts(self) -> Int[Tensor, " batch"]:
        """Absolute position of the first real token of each row; above 0 for left padding."""
        if self.first is not None:
            return self.first
        if self.padding is None or self.key_offset > 0:
            return torch.zeros(self.batch, dtype=torch.long)
        return self.padding.int().argmax(1)

    def visible(self, stop: int) -> int:
        """Upper bound of the number of leading keys that the queries before `stop` attend to."""
        if not self.causal:
            return self.keys
        return max(0, min(self.keys, stop + self.query_offset - self.key_offset))

    def block(
        self, start: int, stop: int, keys: int | None = None, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch_or_1 heads_or_1 rows keys"] | None:
        """Evaluate the mask for the queries [start, stop) and the first `keys` keys.

        Args:
            start: First query.
            stop: One past the last query.
            keys: Number of leading keys; None for all.
            device: Device of the block; None for the device of the padding, or the CPU without padding.

        Returns:
            True where attention is allowed, broadcastable over batch and heads; None if all pairs are allowed.
        """
        width = self.keys if keys is None else keys
        if device is None:
            device = self.padding.device if self.padding is not None else torch.device("cpu")
        block: Tensor | None = None
        key_index = torch.arange(width, device=device) + self.key_offset
        query_index = torch.arange(start, stop, device=device) + self.query_offset
        # query `start` attends to the fewest keys; if it attends to all, the causal triangle has no effect here
        if self.causal and start + self.query_offset < width - 1 + self.key_offset:
            # [1 keys] ≤ [rows 1] → [1 1 rows keys]
            block = (key_index[None, :] <= query_index[:, None])[None, None]
        if self.predicate is not None:
            pattern = self._evaluate(self.predicate, query_index, key_index)
            block = pattern if block is None else block & pattern
        if self.padding is not None:
            real = self.padding[:, None, None, :width].to(device)  # [batch 1 1 keys]
            block = real if block is None else block & real
        return block

    def segments(self) -> Int[Tensor, "batch keys"]:
        """Number the packed sequences of a mask whose `predicate` separates them: 0, 1, … for each token.

        Token i begins a sequence if it does not attend to token i − 1. The numbers are compared with the mask on 64
        rows of queries.

        Raises:
            UnsupportedModelError: If the mask is not causal within consecutive sequences.
        """
        index = torch.arange(self.keys)
        whole = replace(self, padding=None)
        if self.queries != self.keys or self.query_offset != self.key_offset:
            raise UnsupportedModelError(_NOT_PACKED)
        rows = [self._diagonal(whole, start) for start in range(0, self.keys, 512)]
        begins = ~torch.cat(rows, 1)  # [batch keys]
        begins[:, 0] = False
        numbers = begins.long().cumsum(1)  # [batch keys]
        for row in range(0, self.keys, max(1, self.keys // 64)):
            found = whole.block(row, row + 1)
            seen = numbers.new_ones(1, dtype=torch.bool) if found is None else found[:, 0, 0]  # [batch_or_1 keys]
            expected = (numbers == numbers[:, row, None]) & (index.to(numbers.device) <= row)  # [batch keys]
            if bool((seen.to(numbers.device) != expected).any()):
                raise UnsupportedModelError(_NOT_PACKED)
        return numbers

    def _diagonal(self, whole: LazyMask, start: int) -> Tensor:
        """True where a token from `start` on attends to the token before it [batch tokens]; true for the first."""
        stop = min(start + 512, self.keys)
        first = max(0, start - 1)
        block = replace(whole, key_offset=whole.key_offset + first).block(start, stop, stop - first)
        if block is None:
            return torch.ones(self.batch, stop - start, dtype=torch.bool)
        pairs = block[:, 0].expand(self.batch, -1, -1)  # [batch rows keys]
        found = pairs.diagonal(0 if start else -1, 1, 2)  # [batch rows], or one less for the first token
        return found if start else torch.cat([found.new_ones(self.batch, 1), found], 1)

    def dense(self, device: torch.device | str | None = None) -> Bool[Tensor, "batch 1 queries keys"]:
        """Complete mask as one tensor; for references and tests with short inputs only."""
        block = self.block(0, self.queries, device=device)
        if block is None:
            return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(self.shape)
        return block.expand(self.batch, block.shape[1], self.queries, self.keys)

    def to(self, device: torch.device | str) -> LazyMask:
        """Return the mask with its tensors on another device."""
        if self.padding is None:
            return self
        first = None if self.first is None else self.first.to(device)
        return replace(self, padding=self.padding.to(device), first=first)

    def contiguous(self) -> LazyMask:
        """Return `self`; generation with a static cache calls this on a prepared mask."""
        return self

    def _evaluate(self, predicate: MaskPredicate, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Evaluate a predicate on absolute positions [rows] and [keys] → [batch 1 rows keys]."""
        batch_index = torch.arange(self.batch, device=query_index.device)
        head_index = torch.zeros(1, dtype=torch.long, device=query_index.device)
        if self.vectorised:
            for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
                predicate = torch.vmap(predicate, in_dims=dims, out_dims=0)
            # indexing inside vmap calls .item(), which this context turns into a gather; imported here because the
            # import loads the whole compiler, which sets environment variables
            from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

            with TransformGetItemToIndex():
                return predicate(batch_index, head_index, query_index, key_index)
        return predicate(
            batch_index[:, None, None, None],
            head_index[None, :, None, None],
            query_index[None, None, :, None],
            key_index[None, None, None, :],
        )


MASKED = -5e3
"""Entries of additive masks up to this number forbid attention: libraries use −1e4, −1e9, the lowest number or −∞."""


def allowed_by(mask: Shaped[Tensor, "*axes"]) -> Bool[Tensor, "*axes"]:
    """Read a mask tensor: True where attention is allowed.

    Args:
        mask: Boolean, True for allowed; integer, 0 for forbidden; or additive, a large negative number for forbidden.
    """
    if mask.dtype == torch.bool:
        return mask
    return mask > MASKED if mask.is_floating_point() else mask != 0


def key_padding(mask: LazyMask | Tensor | None) -> Bool[Tensor, "batch keys"] | None:
    """Reduce an encoder's attention mask, in any form that transformers passes, to a padding mask.

    Args:
        mask: None without padding; a `LazyMask`; a tensor with 1 or True for real keys [batch keys]; or a boolean or
            additive tensor [batch queries keys] or [batch 1 queries keys] whose queries axis may be 1. Additive masks
            forbid by any number up to `MASKED`.

    Returns:
        True for real tokens; None if every key is real.

    Raises:
        UnsupportedModelError: If queries attend to different keys, as in a decoder or a sliding window.
    """
    if mask is None:
        return None
    if isinstance(mask, LazyMask):
        if mask.causal or mask.predicate is not None:
            raise UnsupportedModelError(_UNEQUAL_ROWS)
        return mask.padding
    if mask.ndim == 2:
        # 1 and 0; a floating mask with negative numbers is additive
        additive = mask.is_floating_point() and not tracing(mask) and bool((mask < 0).any())
        return allowed_by(mask) if additive else mask != 0
    if mask.ndim == 3:
        mask = mask[:, None]  # [batch queries keys] → [batch 1 queries keys]
    kept = allowed_by(mask)
    if not tracing(mask) and bool((kept != kept[:, :1, :1]).any()):
        raise UnsupportedModelError(_UNEQUAL_ROWS)
    return kept[:, 0, 0]  # [batch 1 queries keys] → [batch keys]


_NOT_PACKED = (
    "Found a mask pattern that is not causal within consecutive packed sequences. Expected none, or the one that "
    "transformers derives from position_ids. Remove the pattern, or leave the attention dense."
)
_UNEQUAL_ROWS = (
    "Found a mask under which queries attend to different keys. Expected a padding mask: attention over compressed "
    "keys cannot mask single keys for single queries. Use an encoder without a sliding window."
)


@dataclass(frozen=True, slots=True, eq=False)
class PositionBias:
    """Additive attention bias that depends on the distance of key and query: bias[h, i, j] = relative[h, j − i + n − 1]
    with n queries.

    T5 adds the same learned bias in every layer; the dense tensor would be [1 heads queries keys]. Between layers the
    bias travels as a tensor [1 heads 1 distances], never inside an object: gradient checkpointing, device moves of
    accelerate and distributed wrappers look at tensors only.

    Source: Raffel et al. 2020, section 2.1; `transformers` `T5Attention.compute_bias`.
    """

    relative: Float[Tensor, "heads distances"]
    """Bias of every distance key − query that occurs, in ascending order: queries + keys − 1 columns."""
    queries: int
    """Number of queries n."""

    @classmethod
    def of(cls, bias: Tensor | None, queries: int, keys: int) -> PositionBias | Tensor | None:
        """Read the position bias that an attention module received.

        Args:
            bias: None; a bias by distance [1 heads 1 distances]; or a dense bias [batch_or_1 heads queries keys]. A
                single number is a constant shift of all scores, which changes no weight.
            queries: Number of queries.
            keys: Number of keys.

        Returns:
            None for no bias; the bias by distance; or the dense bias.
        """
        if bias is None or bias.numel() == 1:
            return None
        if bias.shape[0] == bias.shape[2] == 1 and bias.shape[3] == queries + keys - 1:
            return cls(bias[0, :, 0], queries)
        return bias

    def block(self, start: int, stop: int, keys: int) -> Float[Tensor, "1 heads rows keys"]:
        """Bias of the queries [start, stop) and the first `keys` keys."""
        last = self.queries - 1
        columns = self.relative[:, last - stop + 1 : last - start + keys]  # [heads, rows + keys − 1]
        # windows start at the last query, hence the flip: [heads, rows, keys] → [1 heads rows keys]
        return columns.unfold(1, keys, 1).flip(1).unsqueeze(0)

    def at(
        self, head: Int[Tensor, "*pairs"], query: Int[Tensor, "*pairs"], key: Int[Tensor, "*pairs"]
    ) -> Float[Tensor, "*pairs"]:
        """Bias of single pairs; positions outside the sequence get the bias of the nearest distance."""
        column = (key - query + self.queries - 1).clamp(0, self.relative.shape[1] - 1)
        return self.relative[head, column]
