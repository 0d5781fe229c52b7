"""T5 position biases that travel between layers as one small tensor, [1 heads 1 distances]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.surgery.modules import override
from graftwork.surgery.sites import AttentionSite


class BiasByDistance:
    """Replacement for `compute_bias` of an attention module of T5, which returns one bias for each distance.

    Args:
        owner: Attention module, of any class with T5's `compute_bias`.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner: Any = owner

    def __call__(
        self,
        query_length: int,
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> Float[Tensor, "1 heads 1 distances"]:
        """Compute the bias of every distance between new queries and keys.

        Args:
            query_length: Number of new queries.
            key_length: Number of keys.
            device: Device of the result.
            past_seen_tokens: Absolute position of the first query.

        Returns:
            Bias by distance, in the order of `PositionBias.relative`; a single zero for cross-attention.
        """
        owner = self.owner
        embedding = getattr(owner, "relative_attention_bias", None)
        if embedding is None:
            return torch.zeros(1, 1, 1, 1, device=device)
        # the last new query sees the keys at all distances: [1 heads 1 distances]
        compute: Callable[..., Tensor] = cast(Any, type(owner)).compute_bias
        last = query_length - 1 + past_seen_tokens
        return compute(owner, 1, query_length + key_length - 1, device=device, past_seen_tokens=last)


def share_position_bias(
    model: nn.Module, method: str, sites: Sequence[AttentionSite], chosen: Sequence[AttentionSite]
) -> None:
    """Let modules with T5's position bias compute it by distance, if every module that shares it is grafted.

    Otherwise modules without a graft need the dense bias, and the grafted ones read that.

    Args:
        model: The model, changed in place.
        method: Name of the method, for `undo`.
        sites: All attention modules.
        chosen: Attention modules with a new graft.
    """
    groups: dict[object, list[AttentionSite]] = {}
    for site in sites:
        if hasattr(site.module, "compute_bias") and hasattr(site.module, "has_relative_attention_bias"):
            groups.setdefault((site.stack, site.kind), []).append(site)
    paths = {site.path for site in chosen}
    for group in groups.values():
        owners = [site for site in group if hasattr(site.module, "relative_attention_bias")]
        # the first module computes the bias of all (t5), or every module its own (umt5)
        shared = len(owners) < len(group)
        for site in group:
            if {other.path for other in (group if shared else [site])} <= paths:
                override(model, method, site.module, "compute_bias", BiasByDistance(site.module))
                if not owners:
                    # cross-attention has no bias; transformers would build zeros [1 heads queries keys]
                    override(model, method, site.module, "has_relative_attention_bias", True)
