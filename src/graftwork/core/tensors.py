"""Tensors that consist of several, as quantised weights do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors that a value of a state dict consists of; quantised tensors consist of several."""
    import torch

    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def is_composite(value: Any) -> bool:
    """True for a tensor that consists of several, such as integers with their scales."""
    return hasattr(value, "__tensor_flatten__") and len(list(plain_tensors(value))) > 1
