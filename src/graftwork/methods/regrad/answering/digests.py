"""Digests of weights, which detect that any of them has changed."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from itertools import chain
from math import ceil

import torch
from torch import Tensor, nn

PART_BYTES = 4 << 20
"""Size of the parts in which weights are compared: about 5 ms each on a CPU."""


class WeightsChecker:
    """Compares the weights and buffers of a model with those at its creation, in parts.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tensors = _tensors(model)
        self._shapes = _shapes(tensors)
        self._parts = [
            (name, start)
            for name, tensor in tensors.items()
            for start in range(0, tensor.numel() * tensor.element_size(), PART_BYTES)
        ]
        self._digests = [_part_digest(tensors[name], start) for name, start in self._parts]
        self._next, self._due = 0, 0.0

    def check(self, share: float = 1.0) -> bool:
        """Compare the next parts. Return True if they are unchanged.

        Args:
            share: Share of all weights to compare, in turns; less than a part is added to the share of the next call.
                Calls whose shares add up to 1 compare everything.
        """
        self._due += share * len(self._parts)
        # calls that add up to the whole must not leave a part because of rounding
        count = min(len(self._parts), ceil(self._due - 1e-9) if share >= 1 else int(self._due + 1e-9))
        if not count:
            return True
        self._due = max(0.0, self._due - count)
        tensors = _tensors(self.model)
        if _shapes(tensors) != self._shapes:
            return False
        for _ in range(count):
            name, start = self._parts[self._next]
            if _part_digest(tensors[name], start) != self._digests[self._next]:
                return False
            self._next = (self._next + 1) % len(self._parts)
        return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _shapes(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def _part_digest(tensor: Tensor, start: int) -> bytes:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)  # [bytes]
    return blake2b(flat[start : start + PART_BYTES].cpu().numpy().data, digest_size=16).digest()


def weights_digest(model: nn.Module) -> str:
    """Return a digest of all parameters and buffers, non-persistent buffers included; any changed bit changes it."""
    return tensors_digest(_tensors(model))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and bytes of tensors."""
    hasher = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)  # [bytes]
    return hasher.hexdigest()
