"""Dense attention from the arguments of a graft, which proves the attention seam of a model before it is used."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from graftwork.surgery.masks import LazyMask, PositionBias


class MaterialisedAttention(nn.Module):
    """Dense softmax attention, computed from what a graft receives; an `AttentionGraft`.

    If a model computes the same with it as before, then the seam passes everything that attention depends on.
    """

    supports = frozenset({"softcap", "sinks"})

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
        **options: Any,
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Return softmax(c·tanh((q·k·s + b)/c) + mask) v [batch heads queries width]. See `AttentionGraft`."""
        times = query.shape[1] // key.shape[1]
        # [batch groups keys width] → [batch heads keys width]
        key, value = (each.repeat_interleave(times, 1) if times > 1 else each for each in (key, value))
        scores = query @ key.transpose(2, 3) * options["scaling"]  # [batch heads queries keys]
        if (cap := options.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        bias: PositionBias | Tensor | None = options["position_bias"]
        if isinstance(bias, PositionBias):
            bias = bias.block(0, query.shape[2], key.shape[2])
        scores = scores if bias is None else scores + bias
        if isinstance(mask, LazyMask):
            mask = mask.block(0, mask.queries, device=query.device)
        seen: Tensor | None = None
        if mask is not None:
            low = torch.finfo(scores.dtype).min
            allowed = mask if mask.dtype == torch.bool else mask > low / 2
            scores = scores.masked_fill(~allowed, low)
            # padded queries without a key return zero, as grafts do: a model that mixes them into others is refused
            seen = allowed.any(-1, keepdim=True)  # [batch_or_1 1 queries 1]
        if (sinks := options.get("sinks")) is not None:
            # [heads] → [batch heads queries 1]
            extra = cast(Tensor, sinks).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
        output = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value
        return output if seen is None else output * seen
