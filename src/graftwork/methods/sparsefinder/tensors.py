"""Typed forms of torch functions whose annotations lack a complete return type."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def unflatten(tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """Split dimension `dim` of `tensor` [...] into `sizes`, of which one may be −1."""
    return cast(Tensor, tensor.unflatten(dim, sizes))


def integers(tensor: Tensor) -> list[int]:
    """Elements of an integer `tensor` [n] as Python numbers."""
    return cast("list[int]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def numbers(tensor: Tensor) -> list[float]:
    """Elements of a `tensor` [n] as Python numbers."""
    return cast("list[float]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def rows_of_numbers(tensor: Tensor) -> list[list[int]]:
    """Elements of an integer `tensor` [rows n] as nested lists."""
    return cast("list[list[int]]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]


def unique(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Sorted distinct elements of `tensor` [...], or distinct slices along `dim`."""
    return cast(Tensor, torch.unique(tensor, dim=dim))  # pyright: ignore[reportUnknownMemberType]


def row_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm √Σ x² of every row of `tensor` [... n], with the last dimension kept as [... 1]."""
    norm = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, norm)
