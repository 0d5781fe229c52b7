"""Quantised weights of a model: they are read by their modules only, and never trained."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.tensors import is_composite
from graftwork.errors import ConfigError
from graftwork.surgery.sites import named_modules, pretrained

_CONVERSIONS = "_weight_conversions"
_ADDED = ("graftwork_", "lora_")
"""Starts of the names of what methods and PEFT add to a model."""


def is_quantised(parameter: Tensor) -> bool:
    """True if a `parameter` [...] is stored in integers, with scales inside the tensor or beside it."""
    return is_composite(parameter) or not parameter.is_floating_point()


def quantised_modules(model: nn.Module) -> list[str]:
    """Paths of the modules whose own weights are quantised."""
    return [
        path
        for path, module in named_modules(model)
        if any(is_quantised(parameter) for parameter in module.parameters(recurse=False))
    ]


def prepare_quantised(model: nn.Module) -> None:
    """Exclude quantised weights from training, and let the model be saved.

    Loaders leave some quantised weights trainable, which no optimiser updates. transformers records the conversions of
    loading on the model and reverts them when it saves; those of quantised weights cannot be reverted and need not be.
    """
    found = [parameter for parameter in model.parameters() if is_quantised(parameter)]
    for parameter in found:
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    attributes = pretrained(model).__dict__
    if found and attributes.get(_CONVERSIONS):
        attributes[_CONVERSIONS] = [each for each in attributes[_CONVERSIONS] if _is_reversible(each)]


def check_savable(model: nn.Module) -> None:
    """Check that quantised weights have the layout in which they are loaded.

    Raises:
        ConfigError: If bitsandbytes has rearranged them for this CPU, as the first forward pass does: a checkpoint
            that is written afterwards computes something else.
    """
    for path, module in named_modules(model):
        for parameter in module.parameters(recurse=False):
            if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
                raise ConfigError(
                    f"Cannot save the weights of {path}: bitsandbytes has rearranged them for this CPU. Save the model "
                    "on a GPU, or quantise it with torchao."
                )


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def check_trained(model: nn.Module, trained: Iterable[nn.Parameter], phase: str) -> None:
    """Check that a training of a quantised model updates nothing but what methods and PEFT added.

    Args:
        model: The model.
        trained: Parameters to train.
        phase: Name of the training phase.

    Raises:
        ConfigError: If it would update weights of the model itself.
    """
    found = quantised_modules(model)
    chosen = {id(parameter) for parameter in trained}
    if not found or not chosen:
        return
    own = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and not any(part.startswith(_ADDED) for part in name.split("."))
    ]
    if own:
        raise ConfigError(
            f"Phase {phase} would train {own[0]} and {len(own) - 1} others of a model with quantised weights, such as "
            f"those of {found[0]}. They cannot be trained. Set train.lora, or start from a checkpoint in 16 or 32 bits."
        )


@contextmanager
def accepted_by_trainer(model: Any) -> Generator[None]:
    """Present a quantised model to the Trainer as another one, whose check accepts adapters of PEFT only."""
    inner: Any = pretrained(model)
    if not getattr(inner, "is_quantized", False):
        yield
        return
    inner.is_quantized = False
    try:
        yield
    finally:
        inner.is_quantized = True


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Replace the quantised weights of a model by the numbers that they represent, in place.

    Raises:
        ConfigError: If a module's weights cannot be turned back.
    """
    inner: Any = pretrained(model)
    for path in quantised_modules(model):
        module = model.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not is_quantised(parameter):
                continue
            turned: Any = getattr(parameter, "dequantize", None)
            if turned is None or not is_composite(parameter):
                raise ConfigError(
                    f"Found quantised weights of type {type(parameter).__name__} in {path}, which cannot be turned "
                    "back into numbers. Expected weights of torchao."
                )
            setattr(module, name, nn.Parameter(turned(), requires_grad=False))
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(inner, name):
            delattr(inner, name)
    inner.is_quantized = False
