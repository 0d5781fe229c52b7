"""Masks and position biases as descriptions that are evaluated for a few queries at a time.

An attention layer that keeps n·k numbers must never be handed an n·m mask, so what reaches the attention function is an
object that knows how to build any block of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftwork.errors import UnsupportedModelError

MaskPredicate = Callable[..., Any]
"""Maps index tensors (batch, head, query, key) that broadcast together to True where attention is allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class LazyMask:
    """Which keys each query may see, without a tensor of queries × keys.

    Source: `transformers.masking_utils`, whose mask functions receive exactly these parts.
    """

    batch: int
    queries: int
    keys: int
    causal: bool = False
    """Query row r sees keys up to position r + query_offset, counted from key_offset; no further key."""
    query_offset: int = 0
    """Absolute position of query row 0; with a cache, the number of tokens seen before."""
    key_offset: int = 0
    """Absolute position of key 0; not zero for the rolling cache of sliding windows."""
    padding: Bool[Tensor, "batch keys"] | None = None
    """True for real tokens, aligned with the keys; None if every key is real."""
    first: Int[Tensor, " batch"] | None = None
    """Absolute position of each row's first real token, where a rolling cache has dropped it from the padding."""
    predicate: MaskPredicate | None = None
    """Any further pattern (sliding window, packed rows), on absolute positions; None if there is none."""
    vectorised: bool = False
    """The predicate takes scalars and must be expanded by vmap, as user-supplied ones do."""

    @property
    def ndim(self) -> int:
        """4, as transformers asks an already prepared mask for it."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, 1, queries, keys): the shape of the tensor that this mask stands for."""
        return (self.batch, 1, self.queries, self.keys)

    def starts(self) -> Int[Tensor, " batch"]:
        """Absolute position of the first real token of each row; above 0 where padding stands on the left."""
        if self.first is not None:
            return self.first
        if self.padding is None or self.key_offset > 0:
            return torch.zeros(self.batch, dtype=torch.long)
        return self.padding.int().argmax(1)

    def visible(self, stop: int) -> int:
        """Number of leading keys that the query rows before `stop` can see at most."""
        if not self.causal:
            return self.keys
        return max(0, min(self.keys, stop + self.query_offset - self.key_offset))

    def block(
        self, start: int, stop: int, keys: int | None = None, device: torch.device | str | None = None
    ) -> Bool[Tensor, "batch_or_1 heads_or_1 rows keys"] | None:
        """Evaluate query rows start…stop against the first `keys` keys.

        Args:
            start: First query row.
            stop: One past the last query row.
            keys: Leading keys to cover; all of them by default.
            device: Where to build the block; the padding's device, else the CPU, by default.

        Returns:
            True where attention is allowed, broadcastable over batch and heads; None if everything in the block is.
        """
        width = self.keys if keys is None else keys
        if device is None:
            device = self.padding.device if self.padding is not None else torch.device("cpu")
        block: Tensor | None = None
        key_index = torch.arange(width, device=device) + self.key_offset
        query_index = torch.arange(start, stop, device=device) + self.query_offset
        # rows before `start` see less than row `start` does, so one comparison tells whether the triangle matters
        if self.causal and start + self.query_offset < width - 1 + self.key_offset:
            block = (key_index[None, :] <= query_index[:, None])[None, None]
        if self.predicate is not None:
            pattern = self._evaluate(self.predicate, query_index, key_index)
            block = pattern if block is None else block & pattern
        if self.padding is not None:
            real = self.padding[:, None, None, :width].to(device)
            block = real if block is None else block & real
        return block

    def dense(self, device: torch.device | str | None = None) -> Bool[Tensor, "batch 1 queries keys"]:
        """The whole mask as one tensor; for references and tests, never for long inputs."""
        block = self.block(0, self.queries, device=device)
        if block is None:
            return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(self.shape)
        return block.expand(self.batch, block.shape[1], self.queries, self.keys)

    def to(self, device: torch.device | str) -> LazyMask:
        """The same mask with its padding on another device."""
        if self.padding is None:
            return self
        first = None if self.first is None else self.first.to(device)
        return replace(self, padding=self.padding.to(device), first=first)

    def contiguous(self) -> LazyMask:
        """Itself: generation with a static cache asks this of a prepared mask."""
        return self

    def _evaluate(self, predicate: MaskPredicate, query_index: Tensor, key_index: Tensor) -> Tensor:
        batch_index = torch.arange(self.batch, device=query_index.device)
        head_index = torch.zeros(1, dtype=torch.long, device=query_index.device)
        if self.vectorised:
            for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
                predicate = torch.vmap(predicate, in_dims=dims, out_dims=0)
            # an index taken inside vmap calls .item(), which this context turns into a gather; imported here because
            # it brings the whole compiler, which sets environment variables
            from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

            with TransformGetItemToIndex():
                return predicate(batch_index, head_index, query_index, key_index)
        return predicate(
            batch_index[:, None, None, None],
            head_index[None, :, None, None],
            query_index[None, None, :, None],
            key_index[None, None, None, :],
        )


def key_padding(mask: LazyMask | Tensor | None) -> Bool[Tensor, "batch keys"] | None:
    """Reduce a mask of an encoder, in any of its forms, to the keys that are real.

    Source: the forms that transformers hands to attention: nothing where no row is padded, batch × keys with 1 for
    real, batch × 1 × (1 or queries) × keys as booleans or as numbers added to the scores.

    Returns:
        True for real tokens; None if every key is real.

    Raises:
        UnsupportedModelError: If queries see different keys, as in a decoder or a window.
    """
    if mask is None:
        return None
    if isinstance(mask, LazyMask):
        if mask.causal or mask.predicate is not None:
            raise UnsupportedModelError(_UNEQUAL_ROWS)
        return mask.padding
    kept = mask != 0 if mask.ndim == 2 else mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if kept.ndim == 2:
        return kept
    if not torch.compiler.is_compiling() and bool((kept != kept[..., :1, :]).any()):
        raise UnsupportedModelError(_UNEQUAL_ROWS)
    return kept[:, 0, 0]


_UNEQUAL_ROWS = (
    "Found a mask under which queries see different keys. Expected one that only marks padding: attention that "
    "combines keys before it compares them cannot hide single ones from single queries. Use an encoder without a "
    "window."
)


@dataclass(frozen=True, slots=True, eq=False)
class PositionBias:
    """An additive attention bias that depends on key position − query position only, through a small table.

    T5 hands the same learned table to every layer. As a tensor it would be heads × queries × keys numbers.

    Source: Raffel et al. 2020, section 2.1; `transformers` `T5Attention.compute_bias`.
    """

    table: Float[Tensor, "buckets heads"] | None
    """Bias of each bucket; None stands for a bias of zero everywhere (T5 cross-attention)."""
    bucket_of: Callable[[Int[Tensor, "*shape"]], Int[Tensor, "*shape"]] | None = None
    """Maps key position − query position to a bucket."""
    query_offset: int = 0
    """Absolute position of query row 0."""

    def buckets(self, start: int, stop: int, keys: int) -> Int[Tensor, "rows keys"]:
        """Bucket of every pair of query rows start…stop and the first `keys` keys.

        Raises:
            ValueError: If this bias has no table.
        """
        if self.table is None or self.bucket_of is None:
            raise ValueError("found a position bias of zero, which has no buckets; check `table is None` first")
        device = self.table.device
        query_index = torch.arange(start, stop, device=device) + self.query_offset
        return self.bucket_of(torch.arange(keys, device=device)[None, :] - query_index[:, None])

    def block(self, start: int, stop: int, keys: int) -> Float[Tensor, "1 heads rows keys"] | None:
        """The bias of query rows start…stop against the first `keys` keys; None if it is zero."""
        if self.table is None:
            return None
        return self.table[self.buckets(start, stop, keys)].permute(2, 0, 1).unsqueeze(0)
