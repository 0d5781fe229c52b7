"""Training phases of a model's methods, and the adapter of ordinary LoRA training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from graftwork.errors import ConfigError, MissingExtraError
from graftwork.grafting.capabilities import Trains
from graftwork.grafting.converted import Converted
from graftwork.grafting.marks import forget_base
from graftwork.surgery.quantised import dequantise, quantised_modules
from graftwork.surgery.sites import named_modules, pretrained
from graftwork.training.phases import Finetune, Phase


def phases_of(converted: Converted) -> list[Phase]:
    """The phases of all methods; one plain fine-tuning is shared by those that want no more."""
    phases: dict[str, Phase] = {}
    for method in converted.methods:
        for phase in method.phases(converted.model) if isinstance(method, Trains) else (Finetune(),):
            phases.setdefault(phase.name, phase)
    return list(phases.values()) or [Finetune()]


def with_lora(model: Any, lora: Mapping[str, Any] | None) -> nn.Module:
    """Wrap a model by peft with an adapter; None as settings returns the model itself.

    Raises:
        ConfigError: If peft refuses the settings.
        MissingExtraError: If peft is not installed.
    """
    if lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError("peft", "lora") from None
    try:
        options: dict[str, Any] = {
            key: list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value
            for key, value in lora.items()
        }
        if options.get("use_dora") and quantised_modules(model):
            raise ConfigError("train.lora has use_dora on, which quantised weights do not support. Leave it out.")
        return get_peft_model(model, LoraConfig(**options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"peft refused train.lora: {error}") from None


def without_lora(model: Any, base: nn.Module) -> nn.Module:
    """Merge the adapter of `with_lora` into the weights.

    Quantised weights are turned back into numbers first: most updates of an adapter are smaller than a quantisation
    step and would be rounded away.
    """
    if model is base:
        return model
    if not quantised_modules(base):
        return model.merge_and_unload()
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        path.removeprefix("base_model.model."): module
        for path, module in named_modules(model)
        if isinstance(module, LoraLayer)
    }
    deltas = {path: layer.get_delta_weight(layer.active_adapters[0]) for path, layer in layers.items()}
    plain: Any = model.unload()
    dequantise(plain)
    forget_base(pretrained(plain).config)
    with torch.no_grad():
        for path, delta in deltas.items():
            weight: Any = plain.get_submodule(path).weight
            weight.add_(delta.to(weight.dtype))
    return plain
