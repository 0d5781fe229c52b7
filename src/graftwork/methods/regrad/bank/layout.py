"""Binary format of a gradient: order of its tensors, and number precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Precision = Literal["float32", "bfloat16", "int8"]
"""`int8` quantises blocks of 128 consecutive numbers of the flat vector, with one 16-bit scale per block."""

FloatArray = npt.NDArray[np.float32]
Flat = TypeVar("Flat", "Tensor", FloatArray)

BLOCK = 128
"""Numbers that share a scale in int8."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a gradient's tensors, in the order in which they are concatenated."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Iterable[int]]]) -> Layout:
        """Create a layout from pairs of name and shape."""
        return cls(tuple((name, tuple(shape)) for name, shape in shapes))

    @cached_property
    def size(self) -> int:
        """Number of elements in one gradient."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def split(self, flat: Flat) -> dict[str, Flat]:
        """Split flat gradients into views, one per tensor.

        Args:
            flat: Array or tensor of shape `flat` [..., numbers], with `numbers` equal to `size`.

        Returns:
            Name to view of shape [..., *shape of the tensor].
        """
        views: dict[str, Flat] = {}
        start = 0
        for name, shape in self.tensors:
            end = start + math.prod(shape)
            views[name] = flat[..., start:end].reshape(*flat.shape[:-1], *shape)  # [..., *shape]
            start = end
        return views

    def flatten(self, tensors: Mapping[str, Any]) -> FloatArray:
        """Concatenate the tensors of one gradient into a float32 vector [numbers].

        Raises:
            ConfigError: If a tensor is missing, unknown, or has another shape.
        """
        names = {name for name, _ in self.tensors}
        if odd := sorted(names ^ set(tensors)):
            raise ConfigError(f"Found {'no' if odd[0] in names else 'an unknown'} tensor {odd[0]!r} in a gradient.")
        for name, shape in self.tensors:
            if tuple(tensors[name].shape) != shape:
                raise ConfigError(f"Found {name!r} of shape {tuple(tensors[name].shape)}; expected {shape}.")
        parts = [np.asarray(tensors[name], dtype=np.float32).ravel() for name, _ in self.tensors]
        return np.concatenate(parts)  # [numbers]

    def plain(self) -> list[list[Any]]:
        """Return the layout in its JSON form: a list of [name, shape]."""
        return [[name, list(shape)] for name, shape in self.tensors]


def check_precision(precision: str) -> Precision:
    """Return a precision after validating it.

    Raises:
        ConfigError: If it is unknown.
    """
    for known in get_args(Precision):
        if precision == known:
            return known
    raise ConfigError(f"Found precision {precision!r}; expected one of: {', '.join(get_args(Precision))}.")


def stride(size: int, precision: Precision) -> int:
    """Number of bytes of an encoded gradient of `size` numbers."""
    if precision == "int8":
        return size + 2 * -(-size // BLOCK)
    return size * {"float32": 4, "bfloat16": 2}[precision]


def encode(flat: FloatArray, precision: Precision) -> tuple[bytes, float]:
    """Encode a flat float32 gradient.

    With int8, block `b` has the scale `s_b = max|x_b| / 127`, and `x_i` is stored as `round(x_i / s_b)`. The block
    maxima are stored in float16, relative to the largest of them.

    Args:
        flat: Array `flat` [numbers].
        precision: Format of the numbers.

    Returns:
        The bytes, and the scale that `decode` expects.
    """
    if precision == "float32":
        return flat.astype("<f4").tobytes(), 1.0
    if precision == "bfloat16":
        return _round_to_bfloat16(flat).tobytes(), 1.0
    padded = np.zeros(-(-flat.size // BLOCK) * BLOCK, np.float32)
    padded[: flat.size] = flat
    blocks = padded.reshape(-1, BLOCK)  # [blocks, BLOCK]
    largest = np.abs(blocks).max(axis=1)  # [blocks]
    # gradients are small: their block maxima fit into float16 only relative to the largest of them
    scale = float(largest.max()) or 1.0
    relative = (largest / scale).astype("<f2")
    steps = relative.astype(np.float32)[:, None] * (scale / 127)  # [blocks, 1]
    whole = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    numbers = np.clip(np.rint(whole), -127, 127).astype(np.int8).ravel()[: flat.size]  # [numbers]
    return numbers.tobytes() + relative.tobytes(), scale


def decode(data: bytes, size: int, precision: Precision, scale: float) -> FloatArray:
    """Decode the output of `encode` to a float32 array [numbers].

    Args:
        data: Bytes of the gradient.
        size: Number of elements.
        precision: Format of the numbers.
        scale: Second output of `encode`.
    """
    if precision == "float32":
        return np.frombuffer(data, "<f4", size)
    if precision == "bfloat16":
        return (np.frombuffer(data, "<u2", size).astype(np.uint32) << 16).view(np.float32)
    numbers = np.frombuffer(data, np.int8, size).astype(np.float32)
    relative = np.frombuffer(data, "<f2", -(-size // BLOCK), offset=size).astype(np.float32)  # [blocks]
    steps = np.repeat(relative * np.float32(scale / 127), BLOCK)[:size]  # [numbers]
    return np.multiply(numbers, steps, dtype=np.float32)


def _round_to_bfloat16(flat: FloatArray) -> npt.NDArray[np.uint16]:
    """Upper halves of float32 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(flat, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # rounding up the payload of a NaN could produce an infinity
    return np.where(np.isnan(flat), 0x7FC0, rounded).astype("<u2")
