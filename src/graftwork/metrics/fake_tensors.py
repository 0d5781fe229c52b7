"""Fake tensors: run real code on any device without the device, the memory or the values of tensors.

torch's `FakeTensorMode` computes shapes, types and devices only. Two parts are missing in builds of torch without CUDA,
and are added here while a context is open: a device guard for CUDA, and an autograd engine that accepts CUDA tensors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import graph

from graftwork.errors import GraftworkError

_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
"""Symbol of c10's table of device guards, indexed by type of device."""
_CUDA, _META, _TYPES = 1, 14, 21
"""Indices of two types of device in that table, and its length."""
_INSIDE_DISPATCH = (
    "_stats.py",
    "fake_tensor.py",
    "_compile.py",
    "eval_frame.py",
    "_ops.py",
    *(f"metrics{os.sep}{name}" for name in ("fake_tensors.py", "memory.py")),
)
"""Files whose functions pass a question for a device on."""
FLASH_WIDTH = 256
"""Maximum width of an attention head in flash attention."""


def is_fake(value: object) -> bool:
    """True for a tensor without values."""
    return isinstance(value, FakeTensor)


@contextmanager
def fake_tensors(*, real_inputs: bool = False) -> Generator[FakeTensorMode]:
    """Make every tensor created inside fake; CUDA devices are accepted on every machine.

    Args:
        real_inputs: Accept tensors with values, such as the weights of a model, as if they were fake.
    """
    kind = _Mode if torch.cuda.is_available() else _WithoutDevice
    mode = kind(allow_non_fake_inputs=real_inputs)
    before = _register_guard()
    replaced: list[tuple[Any, str, Any]] = [
        (torch.utils, "swap_tensors", _swap),
        (torch.Tensor, "__deepcopy__", _copied),
    ]
    if not torch.cuda.is_available():
        # torch.autocast would switch itself off
        replaced.append((torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        replaced.append((torch.nn.functional, "scaled_dot_product_attention", _attention))
        replaced.append((torch.cuda, "is_bf16_supported", _yes))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with warnings.catch_warnings(), mode, torch.autograd.set_multithreading_enabled(False):
            # copies of fake tensors are compared by their addresses, which are all the same
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield mode
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
        if before is not None:
            before()


def generator_on(device: torch.device, seed: int) -> torch.Generator | None:
    """Return a seeded generator; None for a device that this machine lacks, on which all tensors are fake."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return torch.Generator(device).manual_seed(seed)


def _swap(one: Tensor, other: Tensor) -> None:
    """Exchange two fake tensors, as `Module.to` does; torch's own function refuses tensors with weak references."""
    mine, theirs = dict(one.__dict__), dict(other.__dict__)
    for tensor, values in ((one, theirs), (other, mine)):
        attributes: Any = tensor.__dict__
        attributes.clear()
        attributes.update(values)
    library: Any = torch
    library._C._swap_tensor_impl(one, other)


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copy a tensor for `copy.deepcopy`; torch's own method would copy the storage of a fake one, which has none."""
    if not is_fake(tensor):
        return _deepcopy(tensor, memo)
    copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


_tensor: Any = torch.Tensor
_deepcopy: Any = _tensor.__deepcopy__


def _yes(*_: Any, **__: Any) -> bool:
    return True


class _Mode(FakeTensorMode):
    """Fake tensors that can be copied with `copy.deepcopy`, as a teacher is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self


class _WithoutDevice(_Mode):
    """Fake tensors that the autograd engine takes for tensors on `meta`.

    The engine of a build without CUDA asks for a stream of each CUDA tensor. Its questions come from C++ directly, with
    no Python function in between; all other questions for a device are answered truly. Tensors that the engine then
    creates on `meta` are created on the device of the operation before.
    """

    _kernel: bool
    _device: torch.device | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = dict(kwargs or {})
        device: Any = options.get("device")
        if device is not None and device.type == "meta" and self._device is not None:
            options["device"] = self._device
        for argument in args:
            if isinstance(argument, FakeTensor) and func is not torch.ops.prim.device.default:
                self._device = argument.fake_device
                break
        return super().__torch_dispatch__(func, types, args, options)

    @property
    def in_kernel_invocation(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if the device is reported as `meta`: inside meta kernels, and to the autograd engine."""
        if self._kernel:
            return True
        system: Any = sys
        frame: FrameType | None = system._getframe(1)
        if frame is None or frame.f_code.co_name not in ("_device_handler", "__torch_dispatch__"):
            return False
        while frame is not None and frame.f_code.co_filename.endswith(_INSIDE_DISPATCH):
            frame = frame.f_back
        engine: Any = graph
        return frame is not None and frame.f_code is engine._engine_run_backward.__code__

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._kernel = value


def _register_guard() -> Any:
    """Register the guard of `meta`, which does nothing, for CUDA; return a function that removes it.

    Raises:
        GraftworkError: If the library of this build of torch has no such table.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        # builds with CUDA register a guard of their own, and FakeTensorMode replaces it if there is no device
        return None
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
        table = (ctypes.c_void_p * _TYPES).in_dll(library, _REGISTRY)
    except (OSError, StopIteration, ValueError):
        raise GraftworkError(
            f"torch {torch.__version__} has no CUDA and no table of devices that could be extended, so the memory of a "
            "GPU cannot be computed here. Use device cpu, or a build of torch with CUDA."
        ) from None
    if table[_CUDA]:
        return None
    table[_CUDA] = table[_META]

    def remove() -> None:
        table[_CUDA] = None

    return remove


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` with the fused kernel that a build with CUDA chooses.

    Without a device, torch computes the scores unfused, in parts that all stay in memory.
    """
    values = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
    found = _fused(**{**values, **kwargs})
    return _unfused(*args, **kwargs) if found is None else found


_unfused: Any = torch.nn.functional.scaled_dot_product_attention


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention of the fused kernel; None if only the unfused computation is possible."""
    if not is_fake(query) or query.device.type != "cuda" or query.dim() != 4:
        return None
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    half = query.dtype in (torch.float16, torch.bfloat16)
    aten: Any = torch.ops.aten
    if attn_mask is None and half and query.shape[-1] <= FLASH_WIDTH and torch.backends.cuda.flash_sdp_enabled():
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if not torch.backends.cuda.mem_efficient_sdp_enabled() or query.dtype == torch.float64:
        return None
    if enable_gqa and key.shape[1] != query.shape[1]:
        # the kernel has no grouped queries: torch computes them unfused
        return None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zero = query.new_zeros(())
            attn_mask = torch.where(attn_mask, zero, zero - float("inf"))
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:2], query.shape[2], key.shape[2])
    needs_sum = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_sum, dropout_p, is_causal, scale=scale
    )[0]
