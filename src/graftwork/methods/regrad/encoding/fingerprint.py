"""Fingerprint of gradients: names and values of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    base = [(name, tensor) for name, tensor in inner.state_dict().items() if ADAPTER not in name.split(".")]
    learned = [
        (f"{path}.{name}", getattr(adapter, name)) for path, adapter in found.items() for name in ("lora_A", "lora_B")
    ]
    return {
        "base model": f"{type(inner).__name__} {_size(inner)}",
        "base weights": _digest_tensors(base, SAMPLED),
        "adapter settings": f"rank {config.rank}, scaling {config.scaling:g}",
        "adapter": _digest_tensors(learned, None),
        "tokenizer": tokenizer_digest(tokenizer),
        "document template": config.document_template,
        "truncation length": str(config.max_document_tokens),
        "loss reduction": LOSS_REDUCTION,
        "tensor layout": _digest(json.dumps(layout(model).plain())),
    }


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


def _digest_tensors(tensors: Iterable[tuple[str, Tensor]], sampled: int | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)  # [elements]
        if sampled is not None and flat.numel() > sampled:
            flat = flat[torch.linspace(0, flat.numel() - 1, sampled, dtype=torch.float64).long().to(flat.device)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
