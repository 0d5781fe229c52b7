"""Models that compute in float32 and are identified and written in the type of their checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftwork.surgery.sites import pretrained

Types = Mapping[str, torch.dtype]
"""Name of a parameter or buffer → its type in the checkpoint."""
_STORED = "_graftwork_stored_types"


def widen(model: nn.Module) -> None:
    """Cast 16-bit parameters and buffers to float32, in place; exact. Their types are recorded on the model."""
    types = {name: tensor.dtype for name, tensor in _tensors(model) if tensor.dtype in (torch.bfloat16, torch.float16)}
    pretrained(model).__dict__[_STORED] = types
    _cast(model, dict.fromkeys(types, torch.float32))


def stored_types(model: nn.Module, counted: Callable[[str], bool] = lambda name: True) -> Types:
    """Types in the checkpoint of tensors that are wider in memory; empty if there are none, or if one was trained.

    Args:
        model: The model.
        counted: Selects tensors by name.
    """
    recorded = cast("Types", pretrained(model).__dict__.get(_STORED, {}))
    types = {name: dtype for name, dtype in recorded.items() if counted(name)}
    return types if types and is_exact(model, types) else {}


@torch.no_grad()
def is_exact(model: nn.Module, types: Types) -> bool:
    """True if a cast of the named tensors to these types and back changes no number."""
    return all(
        torch.equal(tensor.to(types[name]).to(tensor.dtype), tensor)
        for name, tensor in _tensors(model)
        if name in types and tensor.dtype != types[name]
    )


@contextmanager
def as_stored(model: nn.Module) -> Generator[None]:
    """Inside the context, a widened model has the types of its checkpoint; a trained model stays as it is."""
    types = stored_types(model)
    if all(tensor.dtype == types[name] for name, tensor in _tensors(model) if name in types):
        # nothing is wider: not widened, trained since, or inside another such context
        yield
        return
    _cast(model, types)
    try:
        yield
    finally:
        # with what a method added in the type of its layer
        widen(model)


def computed_on(model: nn.Module) -> dict[str, str]:
    """Device and data type of a model, for records of its results."""
    inner = pretrained(model)
    return {"device": str(inner.device), "dtype": str(inner.dtype).removeprefix("torch.")}


def _cast(model: nn.Module, types: Types) -> None:
    # the parameters themselves stay: layers share them
    for name, tensor in _tensors(model):
        if name in types and tensor.dtype != types[name]:
            tensor.data = tensor.data.to(types[name])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names, as in the state dict, and buffers that are not saved."""
    module: Any = model
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
