"""Key-value caches of rows that join and leave a running batch; rows are aligned at their last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def is_joinable(cache: Any) -> bool:
    """True if the caches of several batches can be joined: full and sliding-window attention without other states."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds and _is_filled(layer) for layer in cache.layers)


def join_caches(caches: Sequence[Any]) -> None:
    """Append the rows of all caches to the first one, padded on the left to equal length.

    Args:
        caches: Caches for which `is_joinable` is True, of one model.
    """
    length = max(int(cache.get_seq_length()) for cache in caches)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        width = _width(layers[0], length)
        _change(layers[0], lambda name, layers=layers, width=width: _stacked(layers, name, width))
        _set_length(layers[0], length)


def select_rows(cache: Any, rows: Sequence[int], length: int) -> None:
    """Keep some rows of a cache, and its last `length` positions.

    Args:
        cache: Cache for which `is_joinable` is True.
        rows: Rows to keep, in their new order.
        length: Number of positions to keep: those before are padding in all kept rows.
    """
    for layer in cache.layers:
        index = torch.tensor(rows, device=layer.keys.device)
        width = _width(layer, length)

        def select(name: str, layer: Any = layer, index: Tensor = index, width: int = width) -> Tensor:
            states: Tensor = getattr(layer, name)  # [rows heads positions width]
            return states.index_select(0, index)[:, :, states.shape[2] - width :]

        _change(layer, select)
        _set_length(layer, length)


def _is_filled(layer: Any) -> bool:
    # layers that use the states of another layer have none
    return bool(layer.is_initialized) and not getattr(layer, "record_past", False)


def _width(layer: Any, length: int) -> int:
    """Number of positions that a layer stores of `length` tokens."""
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _stacked(layers: Sequence[Any], name: str, width: int) -> Tensor:
    states: list[Tensor] = [getattr(layer, name) for layer in layers]  # [rows heads positions width]
    # F.pad takes the last dimension first
    return torch.cat([F.pad(one, (0, 0, width - one.shape[2], 0)) for one in states])


def _change(layer: Any, change: Callable[[str], Tensor]) -> None:
    for name in ("keys", "values"):
        setattr(layer, name, change(name))


def _set_length(layer: Any, length: int) -> None:
    if layer.is_sliding:
        layer.cumulative_length = length
