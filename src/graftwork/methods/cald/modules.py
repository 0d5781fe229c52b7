"""Linear-complexity attention as modules: the children behind the attention seam, and owners of what is learned."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.methods.cald import functional
from graftwork.methods.cald.config import CaldConfig
from graftwork.surgery.masks import LazyMask, PositionBias, key_padding
from graftwork.surgery.self_attention import Projections, affine_parts


class LinformerAttention(nn.Module):
    """Attention over a fixed number of slots, into which learned matrices combine the tokens.

    Every matrix is a parameter of exactly one module: with `share="kv"` keys and values use one, and with
    `share="layer"` the module of the first converted layer owns it and all others refer to that module.

    Args:
        config: Settings of the conversion.
        rank: Slots of this layer.
        positions: Rows of the matrices.
        heads: Heads of the layer.
        owner: The module that owns the matrix, if it is another one.
        like: A parameter of the layer, for device and type.
        generator: Draws Gaussian entries.
    """

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
        self.form, self.on_long = config.form, config.on_long
        self.length_rule, self.mask_empty = config.effective_length_rule, config.masks_empty_slots
        # a plain reference: registered, the matrix would be counted and saved once for every layer
        self.__dict__["owner"] = owner
        slots = None
        if config.has_slots:
            places = torch.arange(positions)
            slots = places % rank if config.initialization == "identity" else places * rank // positions
            slots = slots.to(like.device)
        self.register_buffer("slots", slots, persistent=False)
        if owner is None:
            shape = (heads, positions, rank) if config.share == "head" else (positions, rank)
            for name in ("projection",) if config.share in ("kv", "layer") else ("key_projection", "value_projection"):
                start = torch.randn(shape, generator=generator) if slots is None else _pattern(slots.cpu(), shape)
                self.register_parameter(name, nn.Parameter(start.to(like)))

    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The compression of keys and that of values, which may be one."""
        owner: LinformerAttention = self.__dict__["owner"] or self
        if self.share in ("kv", "layer"):
            return owner.projection, owner.projection  # type: ignore[return-value]
        return owner.key_projection, owner.value_projection  # type: ignore[return-value]

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch heads keys width"],
        value: Float[Tensor, "batch heads keys width"],
        mask: LazyMask | Tensor | None,
        *,
        scaling: float,
        dropout: float,
        position_bias: PositionBias | Tensor | None,
    ) -> Float[Tensor, "batch heads queries width"]:
        """Attend from keys and values; called by `surgery.attention.attention_function`."""
        return functional.projected_attention(
            query,
            key,
            value,
            *self.matrices(),
            scale=scaling,
            padding=key_padding(mask),
            rule=self._rule(),
            on_long=self.on_long,
            dropout=dropout,
        )

    def uses_hidden_states(self, tokens: int) -> bool:
        """Whether compressing first is asked for, or cheaper; what is traced for any length always compresses first."""
        if self.share == "head" or self.form == "projected":
            return False
        return self.form == "compressed" or torch.compiler.is_compiling() or tokens > self.rank

    def attend(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        projections: Projections,
        mask: LazyMask | Tensor | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Attend from hidden states; called by `surgery.self_attention`."""
        query = projections.query(hidden_states).unflatten(-1, (-1, projections.head_width)).transpose(1, 2)
        output = functional.compressed_attention(
            query,
            hidden_states,
            partial(affine_parts, projections.key),
            partial(affine_parts, projections.value),
            *self.matrices(),
            scale=scaling,
            padding=key_padding(mask),
            rule=self._rule(),
            on_long=self.on_long,
            dropout=dropout,
        )
        return output.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"rank={self.rank}, positions={self.positions}, share={self.share}"

    def _rule(self) -> functional.SlotRule:
        return functional.SlotRule(self.length_rule, self.slots, self.mask_empty)  # type: ignore[arg-type]


class FeatureMapAttention(nn.Module):
    """Attention by a feature map in place of the softmax; nothing is learned."""

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch heads keys width"],
        value: Float[Tensor, "batch heads keys width"],
        mask: LazyMask | Tensor | None,
        *,
        scaling: float,
        dropout: float,
        position_bias: PositionBias | Tensor | None,
    ) -> Float[Tensor, "batch heads queries width"]:
        """Attend; there are no probabilities that could be dropped."""
        return functional.feature_map_attention(query, key, value, scale=scaling, padding=key_padding(mask))


def _pattern(slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Ones where a position starts in a slot."""
    return nn.functional.one_hot(slots, shape[-1]).float().expand(shape).clone()
