"""Linear-complexity attention as modules; `LinformerAttention` owns the learned compression matrices."""

from __future__ import annotations

from functools import partial
from typing import Unpack

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from graftwork.errors import UnsupportedModelError
from graftwork.methods.cald import functional
from graftwork.methods.cald.config import CaldConfig, LengthRule, OnLong
from graftwork.surgery.attention import AttentionOptions
from graftwork.surgery.masks import LazyMask, key_padding
from graftwork.surgery.self_attention import Projections, affine_parts
from graftwork.surgery.tracing import tracing


class LinformerAttention(nn.Module):
    """Attention over a fixed number of slots, to which learned matrices compress the tokens; an `AttentionGraft`.

    Every matrix is a parameter of exactly one module: with `share="kv"` keys and values use the same matrix, and with
    `share="layer"` the module of the first converted layer owns it and the others reference that module.

    Args:
        config: Settings of the conversion.
        rank: Number of slots of this layer.
        positions: Number of rows of the matrices.
        heads: Number of heads of the layer.
        owner: Module that owns the matrix; None if this one does.
        like: Parameter of the layer, of any shape, for device and dtype.
        generator: Random generator of Gaussian entries.
    """

    replaced: bool = True
    """False for dense attention, before the turn of the layer in a stepwise replacement."""

    def __init__(
        self,
        config: CaldConfig,
        rank: int,
        positions: int,
        heads: int,
        *,
        like: Tensor,
        generator: torch.Generator,
        owner: LinformerAttention | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.positions, self.share = rank, positions, config.share
        self.form = config.form
        self.on_long: OnLong = config.on_long
        self.length_rule: LengthRule = config.effective_length_rule
        self.mask_empty = config.masks_empty_slots
        # not registered as a child, or the shared matrix would be counted and saved once per layer
        self.__dict__["owner"] = owner
        slots = None
        if config.has_slots:
            places = torch.arange(positions)  # [positions]
            slots = places % rank if config.effective_initialization == "identity" else places * rank // positions
        self.slots: Tensor | None
        self.register_buffer("slots", None if slots is None else slots.to(like.device), persistent=False)
        if owner is None:
            shape = (heads, positions, rank) if config.share == "head" else (positions, rank)
            for name in ("projection",) if config.share in ("kv", "layer") else ("key_projection", "value_projection"):
                start = torch.randn(shape, generator=generator) if slots is None else _pattern(slots, shape)
                self.register_parameter(name, nn.Parameter(start.to(like)))

    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the compression matrices of keys and values, [positions rank] or [heads positions rank].

        With `share` kv and layer they are the same parameter.
        """
        owner: LinformerAttention = self.__dict__["owner"] or self
        if self.share in ("kv", "layer"):
            shared = owner.get_parameter("projection")
            return shared, shared
        return owner.get_parameter("key_projection"), owner.get_parameter("value_projection")

    def _matrices_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices on the device of x; a replica or a device map may have the owner on another device."""
        key, value = self.matrices()
        if self.__dict__["owner"] is not None and key.is_meta and not x.is_meta:
            raise UnsupportedModelError(
                f"Found the compression matrix of all layers off-loaded (share is {self.share!r}), and a layer on "
                f"{x.device} that needs it. Set share to kv or none, or place the model without off-loading."
            )
        # the same tensor stays the same, so that hidden states are compressed once
        moved = key.to(x.device)
        return moved, moved if value is key else value.to(x.device)

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch heads keys width"],
        value: Float[Tensor, "batch heads keys width"],
        mask: LazyMask | Shaped[Tensor, ...] | None,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries width"]:
        """Compress keys and values, then attend. See `AttentionGraft`."""
        key, value = repeat_heads(key, query), repeat_heads(value, query)
        if not self.replaced:
            return _dense(query, key, value, mask, options)
        return functional.projected_attention(
            query,
            key,
            value,
            *self._matrices_at(query),
            scale=options["scaling"],
            padding=key_padding(mask),
            rule=self._rule(),
            on_long=self.on_long,
            dropout=options["dropout"],
        )

    def uses_hidden_states(self, tokens: int) -> bool:
        """Return True if hidden states are compressed before the projections: by `form`, if cheaper, or if traced."""
        if self.share == "head" or self.form == "projected" or not self.replaced:
            return False
        return self.form == "compressed" or tracing() or tokens > self.rank

    def attend(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        projections: Projections,
        mask: LazyMask | Shaped[Tensor, ...] | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Compress hidden states, project the slots to keys and values, then attend. See `HiddenStatesGraft`.

        Args:
            hidden_states: Input of the layer.
            projections: Query, key and value projections.
            mask: Mask of the call.
            scaling: Factor on the scores.
            dropout: Dropout rate of the probabilities.
        """
        joined = projections.query(hidden_states)  # [batch, tokens, heads·width]
        query = functional.split_heads(
            joined, joined.shape[2] // projections.head_width
        )  # [batch, heads, tokens, width]
        output = functional.compressed_attention(
            query,
            hidden_states,
            partial(affine_parts, projections.key),
            partial(affine_parts, projections.value),
            *self._matrices_at(hidden_states),
            scale=scaling,
            padding=key_padding(mask),
            rule=self._rule(),
            on_long=self.on_long,
            dropout=dropout,
        )
        return output.transpose(1, 2).flatten(2)  # [batch, tokens, heads·width]

    def extra_repr(self) -> str:
        """Settings shown by `print(model)`."""
        return f"rank={self.rank}, positions={self.positions}, share={self.share}"

    def _rule(self) -> functional.SlotRule:
        return functional.SlotRule(self.length_rule, self.slots, self.mask_empty)


class FeatureMapAttention(nn.Module):
    """Attention with a feature map instead of the softmax, without parameters; an `AttentionGraft`."""

    replaced: bool = True
    """False for dense attention, before the turn of the layer in a stepwise replacement."""

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch heads keys width"],
        value: Float[Tensor, "batch heads keys width"],
        mask: LazyMask | Shaped[Tensor, ...] | None,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries width"]:
        """Attend without a softmax; `dropout` is ignored, because there are no probabilities. See `AttentionGraft`."""
        key, value = repeat_heads(key, query), repeat_heads(value, query)
        if not self.replaced:
            return _dense(query, key, value, mask, options)
        return functional.feature_map_attention(query, key, value, scale=options["scaling"], padding=key_padding(mask))


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask | Tensor | None, options: AttentionOptions
) -> Tensor:
    """Dense attention [batch heads tokens width] in place of a mixer."""
    padding, scale = key_padding(mask), options["scaling"]
    return functional.softmax_attention(query, key, value, scale=scale, padding=padding, dropout=options["dropout"])


def repeat_heads(
    states: Float[Tensor, "batch groups keys width"], query: Float[Tensor, "batch heads queries width"]
) -> Float[Tensor, "batch heads keys width"]:
    """Repeat the keys or values of grouped queries for each head of a group.

    Args:
        states: Keys or values.
        query: Queries, whose number of heads counts.
    """
    times = query.shape[1] // states.shape[1]
    return states if times == 1 else states.repeat_interleave(times, 1)  # [batch heads keys width]


def _pattern(slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One-hot matrix of the initial slot of each position."""
    return nn.functional.one_hot(slots, shape[-1]).float().expand(shape).clone()  # [positions, rank] per head
