"""Identity of a model: a digest of its weights, and the check that they are finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftwork.errors import NonFiniteError
from graftwork.surgery.sites import pretrained


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of the state dict; independent of device and file layout.

    Weights that are off-loaded to disk are identified by the checkpoint that the model was loaded from.
    """
    digest = hashlib.sha256()
    state: dict[str, Any] = model.state_dict()
    for name in sorted(state):
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


@torch.no_grad()
def non_finite(model: nn.Module) -> list[str]:
    """Names of parameters with NaN or infinity; buffers may contain them, as marks of absent centroids do."""
    return [
        name
        for name, parameter in model.named_parameters()
        if _checkable(parameter) and not bool(torch.isfinite(parameter).all())
    ]


def _checkable(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.dtype.is_floating_point and tensor.element_size() > 1


def check_finite(model: nn.Module, action: str) -> None:
    """Raise an error if weights are not finite.

    Args:
        model: The model.
        action: What cannot be done, for the message, such as "save the model".

    Raises:
        NonFiniteError: If a parameter has a NaN or an infinity; the message names the first ones.
    """
    if names := non_finite(model):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise NonFiniteError(
            f"Cannot {action}: {', '.join(names[:3])}{more} contain NaN or infinite values. Start from a checkpoint "
            "with finite weights, or train again with a lower learning rate."
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, rules, special tokens and chat template."""
    content: dict[str, Any] = {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    content["chat_template"] = getattr(tokenizer, "chat_template", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content["vocabulary"] = tokenizer.get_vocab()
    else:
        rules = cast("dict[str, Any]", json.loads(backend.to_str()))
        # truncation and padding are settings of the last call
        content["rules"] = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
