"""Detection of tracing, under which the values of tensors are unknown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.errors import UnsupportedModelError


def tracing(*tensors: Tensor | None) -> bool:
    """True if code must not branch on the values of tensors: under `torch.compile`, `torch.export`, `torch.jit.trace`,
    or if one of `tensors` is a fake tensor.
    """
    if torch.compiler.is_compiling() or _records():
        return True
    return any(tensor is not None and hasattr(tensor, "fake_mode") for tensor in tensors)


def refuse_trace(layers: str) -> None:
    """Raise under `torch.jit.trace` and the TorchScript exporter of ONNX.

    Both record the operators of one example, so that padding, lengths and tiles of that example would become constants.

    Args:
        layers: Name of the layers, for the message.

    Raises:
        UnsupportedModelError: If a trace is being recorded.
    """
    if _records():
        raise UnsupportedModelError(
            f"Found torch.jit.trace (or torch.onnx.export with dynamo=False) of {layers}. Expected torch.compile or "
            "torch.export: a recorded trace would be valid for the lengths and the padding of its example only. Export "
            "the dense model (graftwork.restore), or use torch.export."
        )


def _records() -> bool:
    """True under `torch.jit.trace`."""
    jit: Any = torch.jit
    return bool(jit.is_tracing())
