"""Gradients as bytes: which tensors stand where, and in what precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from graftwork.errors import ConfigError

Precision = Literal["float32", "bfloat16", "int8"]
"""`int8` keeps blocks of 128 numbers, cut from the flat vector, with a 16-bit scale each."""

BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of one gradient, in the order in which they lie one behind the other."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Iterable[int]]]) -> Layout:
        """A layout from names and shapes."""
        return cls(tuple((name, tuple(shape)) for name, shape in shapes))

    @cached_property
    def size(self) -> int:
        """Numbers in one gradient."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def split(self, flat: Any) -> dict[str, Any]:
        """Views of the tensors inside flat gradients.

        Args:
            flat: Array or tensor of shape [..., size].
        """
        views, start = {}, 0
        for name, shape in self.tensors:
            end = start + math.prod(shape)
            views[name] = flat[..., start:end].reshape(*flat.shape[:-1], *shape)
            start = end
        return views

    def flatten(self, tensors: Mapping[str, Any]) -> np.ndarray:
        """One gradient as a flat vector of 32-bit numbers.

        Raises:
            ConfigError: If a tensor is missing, is too many, or has another shape.
        """
        names = {name for name, _ in self.tensors}
        if odd := sorted(names ^ set(tensors)):
            raise ConfigError(f"Found {'no' if odd[0] in names else 'an unknown'} tensor {odd[0]!r} in a gradient.")
        for name, shape in self.tensors:
            if tuple(tensors[name].shape) != shape:
                raise ConfigError(f"Found {name!r} of shape {tuple(tensors[name].shape)}; expected {shape}.")
        parts = [np.asarray(tensors[name], dtype=np.float32).ravel() for name, _ in self.tensors]
        return np.concatenate(parts)

    def plain(self) -> list[list[Any]]:
        """The layout as JSON holds it."""
        return [[name, list(shape)] for name, shape in self.tensors]


def check_precision(precision: str) -> Precision:
    """The precision, if there is such a one.

    Raises:
        ConfigError: If there is not.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"Found precision {precision!r}; expected one of: {', '.join(get_args(Precision))}.")
    return precision  # type: ignore[return-value]


def stride(size: int, precision: Precision) -> int:
    """Bytes of one gradient of `size` numbers."""
    if precision == "int8":
        return size + 2 * -(-size // BLOCK)
    return size * {"float32": 4, "bfloat16": 2}[precision]


def encode(flat: np.ndarray, precision: Precision) -> tuple[bytes, float]:
    """A flat 32-bit gradient as bytes, with the scale that `decode` needs."""
    if precision == "float32":
        return flat.astype("<f4").tobytes(), 1.0
    if precision == "bfloat16":
        return _round_to_bfloat16(flat).tobytes(), 1.0
    padded = np.zeros(-(-flat.size // BLOCK) * BLOCK, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    # gradients are small: their block scales fit 16 bits only relative to the largest of them
    scale = float(largest.max()) or 1.0
    relative = (largest / scale).astype("<f2")
    steps = relative.astype(np.float32)[:, None] * (scale / 127)
    whole = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    numbers = np.clip(np.rint(whole), -127, 127).astype(np.int8).ravel()[: flat.size]
    return numbers.tobytes() + relative.tobytes(), scale


def decode(data: Any, size: int, precision: Precision, scale: float) -> np.ndarray:
    """What `encode` wrote, as 32-bit numbers."""
    if precision == "float32":
        return np.frombuffer(data, "<f4", size)
    if precision == "bfloat16":
        return (np.frombuffer(data, "<u2", size).astype(np.uint32) << 16).view(np.float32)
    numbers = np.frombuffer(data, np.int8, size).astype(np.float32)
    relative = np.frombuffer(data, "<f2", -(-size // BLOCK), offset=size).astype(np.float32)
    return numbers * np.repeat(relative * np.float32(scale / 127), BLOCK)[:size]


def _round_to_bfloat16(flat: np.ndarray) -> np.ndarray:
    """The upper halves of 32-bit numbers, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(flat, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # adding to the payload of a NaN could turn it into an infinity
    return np.where(np.isnan(flat), 0x7FC0, rounded).astype("<u2")
