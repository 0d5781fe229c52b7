"""Fingerprint of gradients: names and values of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftwork.core.tensors import plain_tensors as parts
from graftwork.grafting.precision import Types, stored_types
from graftwork.methods.regrad.bank.files import BASE, ROUNDED, TYPE
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.modules import ADAPTER, adapters, layout
from graftwork.surgery.sites import pretrained

SAMPLED = 65_536
"""Number of evenly spaced elements per frozen tensor that enter the digest; adapters are hashed completely."""
LOSS_REDUCTION = "mean over tokens"


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: ReGradConfig) -> dict[str, str]:
    """Return the fingerprint of gradients of this model.

    Step sizes and strength apply when a gradient is used, so they are not part of it.

    Args:
        model: The converted model.
        tokenizer: Tokenizer of the model.
        config: Settings of the conversion.
    """
    inner = pretrained(model)
    found = adapters(model)
    base, types = _base(model), stored_types(model)
    kinds = {str(types.get(name, tensor.dtype)) for name, tensor in base if tensor.is_floating_point()}
    learned = [
        (f"{path}.{name}", getattr(adapter, name)) for path, adapter in found.items() for name in ("lora_A", "lora_B")
    ]
    return {
        "base model": f"{type(inner).__name__} {_size(inner)}",
        BASE: _digest_tensors(base, SAMPLED, types),
        TYPE: ", ".join(sorted(kind.removeprefix("torch.") for kind in kinds)),
        ROUNDED: _rounded(base),
        "adapter settings": f"rank {config.rank}, scaling {config.scaling:g}",
        "adapter": _digest_tensors(learned, None, {}),
        "tokenizer": tokenizer_digest(tokenizer),
        "document template": config.document_template,
        "truncation length": str(config.max_document_tokens),
        "loss reduction": LOSS_REDUCTION,
        "tensor layout": _digest(json.dumps(layout(model).plain())),
    }


def earlier_base(model: nn.Module, found: Mapping[str, str]) -> dict[str, str]:
    """Entry for the base weights that an earlier version would have written, if a bank of such a version has it.

    Earlier versions hashed the weights in the type in which they were loaded, and only in that one.

    Args:
        model: The converted model.
        found: Fingerprint of the bank.
    """
    base, types = _base(model), stored_types(model)
    if ROUNDED in found or found.get(BASE) == _digest_tensors(base, SAMPLED, types):
        return {}
    floating = [name for name, tensor in base if tensor.is_floating_point()]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        digest = _digest_tensors(base, SAMPLED, dict.fromkeys(floating, dtype))
        if digest == found.get(BASE):
            return {BASE: digest}
    return {}


def recorded_step_sizes(model: nn.Module) -> dict[str, list[float]]:
    """Return minimum, mean and maximum step size of every tensor."""
    found: dict[str, list[float]] = {}
    for path, adapter in adapters(model).items():
        for name, sizes in zip(("lora_A", "lora_B"), adapter.step_sizes(), strict=True):
            numbers = (sizes.min(), sizes.mean(), sizes.max())
            found[f"{path}.{name}"] = [float(number.detach()) for number in numbers]
    return found


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the tokenizer's behaviour; its last padding and truncation settings are ignored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    content["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content["chat"] = str(getattr(tokenizer, "chat_template", None))
    return _digest(json.dumps(content, sort_keys=True))


def _size(model: PreTrainedModel) -> str:
    config = cast("Any", model.config).get_text_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    return "×".join(str(getattr(config, name, "?")) for name in names)


def _base(model: nn.Module) -> list[tuple[str, Tensor]]:
    state = pretrained(model).state_dict()
    return [(name, part) for name, value in state.items() if ADAPTER not in name.split(".") for part in parts(value)]


def _digest_tensors(tensors: Iterable[tuple[str, Tensor]], sampled: int | None, types: Types) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        dtype = types.get(name, tensor.dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {dtype}".encode())
        digest.update(_bytes(_sample(tensor, sampled).to(dtype)))
    return digest.hexdigest()


def _rounded(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of the values in bfloat16, equal for weights loaded in float32, in bfloat16 or as stored."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        flat = _sample(tensor, SAMPLED)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(flat.to(torch.bfloat16) if flat.is_floating_point() else flat))
    return digest.hexdigest()


def _sample(tensor: Tensor, count: int | None) -> Tensor:
    flat = tensor.detach().reshape(-1)  # [elements]
    if count is None or flat.numel() <= count:
        return flat
    return flat[torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)]


def _bytes(flat: Tensor) -> bytes:
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
