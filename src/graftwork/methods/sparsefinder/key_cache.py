"""Projected keys beside the keys of a generation cache, so that a decoding step projects the new tokens only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from graftwork.surgery.modules import GRAFT, children_of

STATE = "_graftwork_projected_keys"
"""Attribute of a cache layer that holds its projected keys."""


@dataclass(frozen=True, slots=True, eq=False)
class ProjectedKeys:
    """Projection of all keys of a cache layer."""

    keys: Tensor
    """The keys themselves [batch groups keys width]; the layer replaces this tensor at every change."""
    projected: Tensor
    """Their projection [batch heads keys rounds]."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheSlot:
    """Cache layer of the running call, and the projected keys that were valid before it."""

    layer: DynamicLayer
    before: Tensor | None
    """Projected keys [batch heads cached rounds]; None if the cached keys have changed since, as by a beam search."""


def remember_cache(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: hand the layer of its cache to the graft before keys are added."""
    graft: Any = children_of(module).get(GRAFT)
    if graft is None:
        return
    graft.cache_slot = None
    cache: Any = options.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    number: Any = getattr(module, "layer_idx", None)
    if not isinstance(cache, Cache) or number is None or torch.compiler.is_compiling():
        return
    layers = cast("list[Any]", cache.layers)
    if number >= len(layers):
        # the layer is created in this call; the next one finds it
        return
    layer = layers[number]
    # other kinds of layers change their keys in place
    if type(layer) is not DynamicLayer:
        return
    state: ProjectedKeys | None = getattr(layer, STATE, None)
    graft.cache_slot = CacheSlot(layer, None if state is None or state.keys is not layer.keys else state.projected)


def project_cached(slot: CacheSlot | None, key: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """Project keys, of which those that are cached and unchanged are not projected again.

    Args:
        slot: Cache layer of the call; None without a cache.
        key: All keys [batch groups keys width].
        project: Projection of keys to [batch heads keys rounds].

    Returns:
        Projected keys [batch heads keys rounds].
    """
    if slot is None or key is not slot.layer.keys or torch.is_grad_enabled():
        return project(key)
    known = slot.before
    projected = project(key) if known is None else torch.cat([known, project(key[:, :, known.shape[2] :])], 2)
    setattr(slot.layer, STATE, ProjectedKeys(key, projected))
    return projected
