"""Identity of a model: digests of its weights and of its tokenizer."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
from torch import nn

from graftwork.core.tensors import is_composite, plain_tensors
from graftwork.grafting.precision import Types, is_exact, stored_types
from graftwork.surgery.sites import pretrained


def weights_digest(model: nn.Module, *, without: str | None = None) -> str:
    """SHA-256 over names, types, shapes and values of the state dict; independent of device and file layout.

    Weights that were widened to float32 at loading are hashed in the type of their checkpoint. Weights that are
    off-loaded to disk are identified by the checkpoint that the model was loaded from.

    Args:
        model: The model.
        without: Name of child modules whose tensors are left out, such as those that a method added.
    """
    return _digest(model, without, stored_types(model, partial(_is_counted, without)))


def matches_digest(model: nn.Module, recorded: str, *, without: str | None = None) -> bool:
    """True if a digest was made of these weights: in the type in memory, in that of the checkpoint, or in another one.

    Args:
        model: The model.
        recorded: Result of `weights_digest`.
        without: As in `weights_digest`.
    """
    if weights_digest(model, without=without) == recorded:
        return True
    state: dict[str, Any] = model.state_dict()
    # quantised weights have one form only
    floating = [name for name, value in state.items() if value.is_floating_point() and not is_composite(value)]
    names = [name for name in floating if _is_counted(without, name)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        types = dict.fromkeys(names, dtype)
        if is_exact(model, types) and _digest(model, without, types) == recorded:
            return True
    return False


def _is_counted(without: str | None, name: str) -> bool:
    return without is None or without not in name.split(".")


@torch.no_grad()
def _digest(model: nn.Module, without: str | None, types: Types) -> str:
    digest = hashlib.sha256()
    state: dict[str, Any] = model.state_dict()
    for name in sorted(name for name in state if _is_counted(without, name)):
        for part in plain_tensors(state[name]):
            tensor = part.to(types[name]) if name in types else part
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.device.type == "meta":
                config: Any = pretrained(model).config
                digest.update(f"{config._name_or_path} {getattr(config, '_commit_hash', None)}".encode())
            else:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
