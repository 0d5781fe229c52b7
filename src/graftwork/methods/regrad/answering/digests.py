"""Numbers that stand for weights, to see that nothing of them has changed."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor, nn


def weights_digest(model: nn.Module) -> str:
    """A digest of every parameter and buffer, of those too that no checkpoint holds; changes with a single bit."""
    return tensors_digest(dict(chain(model.named_parameters(), model.named_buffers())))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and bytes."""
    hasher = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
