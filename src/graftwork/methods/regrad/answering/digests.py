"""Digests of weights, which detect that any of them has changed."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor, nn


def weights_digest(model: nn.Module) -> str:
    """Return a digest of all parameters and buffers, non-persistent buffers included; any changed bit changes it."""
    return tensors_digest(dict(chain(model.named_parameters(), model.named_buffers())))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and bytes of tensors."""
    hasher = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)  # [bytes]
    return hasher.hexdigest()
