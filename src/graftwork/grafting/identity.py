"""Identity of a model: digests of its weights and of its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.surgery.sites import pretrained


@torch.no_grad()
def weights_digest(model: nn.Module, *, without: str | None = None) -> str:
    """SHA-256 over names, types, shapes and values of the state dict; independent of device and file layout.

    Weights that are off-loaded to disk are identified by the checkpoint that the model was loaded from.

    Args:
        model: The model.
        without: Name of child modules whose tensors are left out, such as those that a method added.
    """
    digest = hashlib.sha256()
    state: dict[str, Any] = model.state_dict()
    for name in sorted(name for name in state if without is None or without not in name.split(".")):
        for tensor in _plain_tensors(state[name]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.device.type == "meta":
                config: Any = pretrained(model).config
                digest.update(f"{config._name_or_path} {getattr(config, '_commit_hash', None)}".encode())
            else:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a value of a state dict consists of; quantised tensors consist of several."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
