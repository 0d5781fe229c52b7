"""Checks that the weights of a model are finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwork.core.tensors import plain_tensors
from graftwork.errors import NonFiniteError

LARGEST = 1e18
"""Largest magnitude of a trained weight; the product of two larger ones overflows float32 and bfloat16."""
MARKS = "non_finite_marks"
"""Attribute of a module with the names of its buffers in which NaN or infinity has a meaning."""


@torch.no_grad()
def non_finite(model: nn.Module) -> list[str]:
    """Names of parameters and buffers with NaN or infinity.

    Buffers that a module lists in its attribute `non_finite_marks`, such as absent centroids, and masks of zero and
    minus infinity are not counted.
    """
    found = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        marks: frozenset[str] = getattr(model.get_submodule(owner), MARKS, frozenset())
        if own not in marks and not _is_finite(buffer) and not _is_mask(buffer):
            found.append(name)
    return found


@torch.no_grad()
def oversized(model: nn.Module) -> list[str]:
    """Names of parameters that are not finite or exceed `LARGEST`, so that outputs overflow."""
    return [
        name
        for name, parameter in model.named_parameters()
        for part in plain_tensors(parameter)
        # a comparison with NaN is False
        if _is_checkable(part) and part.numel() and not bool(part.abs().max().float() <= LARGEST)
    ]


def check_finite(model: nn.Module, action: str) -> None:
    """Raise an error if weights are not finite.

    Args:
        model: The model.
        action: What cannot be done, for the message, such as "save the model".

    Raises:
        NonFiniteError: If a parameter or a buffer has a NaN or an infinity; the message names the first ones.
    """
    if names := non_finite(model):
        raise NonFiniteError(
            f"Cannot {action}: {first_of(names)} contain NaN or infinite values. Start from a checkpoint "
            "with finite weights, or train again with a lower learning rate."
        )


def first_of(names: list[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_finite(tensor: Tensor) -> bool:
    return all(not _is_checkable(part) or bool(torch.isfinite(part).all()) for part in plain_tensors(tensor))


def _is_mask(buffer: Tensor) -> bool:
    return bool(((buffer == 0) | (buffer == -torch.inf)).all())


def _is_checkable(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.dtype.is_floating_point and tensor.element_size() > 1
