"""Accounting of tensor memory: bytes of all live storages by device, their peak, and transfers to the host."""

from __future__ import annotations

import os
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork.core.tensors import plain_tensors
from graftwork.metrics.fake_tensors import is_fake

ALIGNMENT = {"cuda": 512, "cpu": 64}
"""Sizes of allocations are multiples of this number of bytes, by type of device."""
# not resolved, because the file names of frames are not
_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_PACKAGES = str(Path(torch.__file__).parent.parent)
_OWN = str(Path(__file__).parent.parent)
_aten: Any = torch.ops.aten


class MemoryRecorder(TorchDispatchMode):
    """Records live bytes and host synchronisations of every operation inside.

    Storages are held by weak references, so that memory counts until the last tensor of a storage is freed, by Python
    or by autograd. Enter it inside `fake_tensors`, or around real computation.

    An operation whose result depends on values, which fake tensors do not have, is answered with an upper bound (all
    elements are non-zero) or with zero, and recorded in `syncs`.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self.syncs: Counter[str] = Counter()
        """Number of times that the host waited for a device, by the function that caused it."""
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes of all live storages, over all devices."""
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        """Sum of the peaks of all devices since the last `reset_peak`."""
        return sum(self.peak.values())

    def reset_peak(self) -> None:
        """Set the peaks to the bytes that are live now."""
        self.peak = defaultdict(int, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = dict(kwargs or {})
        answer = _VALUE_DEPENDENT.get(func)
        if answer is not None and any(map(is_fake, _tensors((args, options)))):
            found = answer(self, func, args, options)
            if found is not NotImplemented:
                for tensor in _tensors(found):
                    self.track(tensor)
                return found
        result = func(*args, **options)
        if func in _COPIES:
            self._record_transfer(func, args, result)
        for tensor in _tensors(result):
            self.track(tensor)
        return result

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a `tensor` [...] until it is freed; a storage that is known counts once."""
        if tensor.is_sparse or tensor.device.type == "meta":
            return
        storage: Any = tensor.untyped_storage()
        key: int = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            return
        device = str(tensor.device)
        unit = ALIGNMENT.get(tensor.device.type, 1)
        size = -(-storage.nbytes() // unit) * unit

        def freed(_: object, key: int = key, device: str = device, size: int = size) -> None:
            self.live[device] -= size
            self._known.pop(key, None)

        self._known[key] = (weakref.ref(storage, freed), device, size)
        self.live[device] += size
        self.peak[device] = max(self.peak[device], self.live[device])

    def _record_transfer(self, func: Any, args: Sequence[Any], result: Any) -> None:
        source = args[1] if func is _aten.copy_.default else args[0]
        if isinstance(source, Tensor) and source.device.type != "cpu" and result.device.type == "cpu":
            self.record_sync("copy")

    def record_sync(self, kind: str) -> None:
        """Count a host synchronisation under the function that caused it."""
        self.syncs[f"{kind} {call_site()}"] += 1


def call_site() -> str:
    """Innermost running function outside torch and this package, as module path and name."""
    system: Any = sys
    frame: FrameType | None = system._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN) and not file.startswith(_HERE):
            return f"{file.removeprefix(_OWN).strip(os.sep)}:{frame.f_code.co_name}"
        if file.startswith(_PACKAGES) and not file.startswith(_TORCH):
            return f"{file.removeprefix(_PACKAGES).strip(os.sep)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def bytes_of(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    sizes: dict[int, int] = {}
    for tensor in (part for each in tensors for part in plain_tensors(each)):
        storage: Any = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in nested containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in cast("Mapping[Any, Any]", values).values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in cast("Sequence[Any]", values):
            yield from _tensors(value)


def _scalar(recorder: MemoryRecorder, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A number of a tensor: its constant if it has one, else zero."""
    tensor: Any = args[0]
    constant = getattr(tensor, "constant", None)
    if tensor.device.type != "cpu":
        recorder.record_sync("value")
    elif constant is not None:
        return NotImplemented
    return _zero(tensor.dtype)


def _zero(dtype: torch.dtype) -> bool | int | float | complex:
    if dtype == torch.bool:
        return False
    if dtype.is_complex:
        return 0j
    return 0.0 if dtype.is_floating_point else 0


def _nonzero(recorder: MemoryRecorder, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensor: Tensor = args[0]
    recorder.record_sync("size")
    return tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.long)


def _masked_select(recorder: MemoryRecorder, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    recorder.record_sync("size")
    tensor, mask = args[0], args[1]
    return tensor.new_empty((max(tensor.numel(), mask.numel()),))


def _index(recorder: MemoryRecorder, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Selection by a boolean mask, as if every element were selected."""
    tensor: Tensor = args[0]
    indices: Sequence[Tensor | None] = args[1]
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return NotImplemented
    recorder.record_sync("size")
    whole: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            whole.append(index)
        else:
            # a mask of n dimensions replaces n indices
            whole += [index.new_empty((index.numel(),), dtype=torch.long)] * index.dim()
    return func(tensor, whole)


def _equal(recorder: MemoryRecorder, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    recorder.record_sync("value")
    return True


_VALUE_DEPENDENT: dict[Any, Any] = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _masked_select,
    _aten.index.Tensor: _index,
    _aten.equal.default: _equal,
}
"""Operations whose result depends on values."""
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
