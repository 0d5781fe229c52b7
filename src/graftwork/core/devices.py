"""Placement of models: device, device map and data type. Every loader calls `place`; nothing else decides devices."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypedDict

from graftwork.core.messages import say
from graftwork.core.processes import local_rank, processes_here
from graftwork.errors import ConfigError

CPU = "cpu"
ACCELERATOR = "accelerator"
"""Name of the accelerator of this process, of any kind; an error on a machine without."""
WIDE = "float32"
"""Type of computation on a CPU that lacks instructions for the type of the checkpoint."""
_INSTRUCTIONS = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
_ANNOUNCED: set[str] = set()
_DEFAULT: ContextVar[str | None] = ContextVar("graftwork_device", default=None)


class Placing(TypedDict, total=False):
    """Options of a loader: what its caller asks for. A missing entry and None let `place` decide."""

    device: str | None
    device_map: Any
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Placement:
    """Device, device map and data type of a model, with the reasons for them."""

    device: str
    """Device of the model, such as cuda:0; with a device map, the device of its inputs."""
    dtype: str | None
    """Type of the weights in memory; None if the checkpoint decides and is not read yet, or is quantised."""
    device_map: Any = None
    """Device map as in `from_pretrained`; None for one device."""
    stored: str | None = None
    """Type of the weights in the checkpoint; None if unknown or quantised."""
    widened: bool = False
    """True if the type was chosen for the CPU in place of the checkpoint's."""
    where: str = ""
    """Reason for the device."""
    why: str = ""
    """Reason for the type."""

    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`. Weights that are widened are loaded as stored first."""
        options: dict[str, Any] = {"dtype": (self.stored if self.widened else self.dtype) or "auto"}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        elif self.device != CPU:
            # directly, without a copy in the memory of the CPU
            options["device_map"] = {"": self.device}
        return options

    def line(self, name: str) -> str:
        """One line for people: device, type and the reasons."""
        place = self.device if self.device_map is None else f"the devices of device map {self.device_map!r}"
        reasons = "; ".join(part for part in (self.where, self.why) if part)
        return f"{name}: on {place} in {self.dtype or 'the types of the quantised checkpoint'} ({reasons})"


def place(
    stored: str | None = None,
    *,
    device: str | None = None,
    device_map: Any = None,
    dtype: str | None = None,
    size: int | None = None,
) -> Placement:
    """Decide device, device map and data type of a model.

    The device is the accelerator of this process if there is one (each process of `torchrun` has its own, by
    LOCAL_RANK), else the CPU. The type is that of the checkpoint, except for 16-bit checkpoints on a CPU without
    instructions for them, where float32 is about three times as fast.

    Args:
        stored: Type of the weights in the checkpoint; None if unknown or quantised.
        device: Device by name: cpu, cuda, cuda:1, xpu, mps, or accelerator for one of any kind. None for the
            accelerator if there is one.
        device_map: Device map as in `from_pretrained`, for models larger than one device.
        dtype: Data type of the weights; overrides every rule.
        size: Bytes of the weights as stored. If they do not fit into memory in float32, they stay as stored.

    Raises:
        ConfigError: If there is no such device, or both `device` and `device_map` are given.
    """
    if device is not None and device_map is not None:
        raise ConfigError(
            f"Found device {device!r} and device_map {device_map!r}. Expected one of them: a device for the whole "
            "model, or a map that spreads it."
        )
    chosen, where = _device(device or (_DEFAULT.get() if device_map is None else None))
    if device_map is not None:
        where = "device map given"
    if dtype is not None:
        return Placement(chosen, dtype, device_map, stored, where=where, why="type given")
    if stored is None:
        return Placement(chosen, None, device_map, where=where, why="")
    if chosen != CPU or stored not in _INSTRUCTIONS:
        return Placement(chosen, stored, device_map, stored, where=where, why="type of the checkpoint")
    if has_instructions(stored):
        why = "type of the checkpoint, for which this CPU has instructions"
        return Placement(chosen, stored, device_map, stored, where=where, why=why)
    lacks = f"the checkpoint is in {stored}, for which this CPU has no instructions"
    if device_map is not None:
        # weights that are off-loaded to disk cannot be cast
        return Placement(chosen, stored, device_map, stored, where=where, why=f"{lacks}; dtype {WIDE} is faster")
    free = free_memory()
    if size is not None and 2 * size > free:
        why = f"{lacks}, but float32 does not fit into the free {free / 1e9:.1f} GB"
        return Placement(chosen, stored, device_map, stored, where=where, why=why)
    why = f"{lacks}; dtype {stored} keeps it"
    return Placement(chosen, WIDE, device_map, stored, widened=True, where=where, why=why)


@contextmanager
def default_device(device: str | None) -> Generator[None]:
    """Place models inside the context on a device, where their loader asks for none."""
    if device is not None:
        place(device=device)
    token = _DEFAULT.set(device)
    try:
        yield
    finally:
        _DEFAULT.reset(token)


def move(model: Any, device: str | None) -> None:
    """Move a model to a device, in place; None leaves it on its own."""
    if device is None:
        return
    chosen = place(device=device).device
    # weights that are off-loaded to disk are on meta, and stay there
    if {str(parameter.device) for parameter in model.parameters()} - {chosen, "meta"}:
        model.to(chosen)


def trains_on_cpu(device: str | None) -> bool:
    """True if a training that asks for a device, or for none, runs on the CPU; see `training_device`."""
    return training_device(device) == CPU


def training_device(device: str | None) -> str:
    """Device of a training that asks for one, or for none.

    Raises:
        ConfigError: If it asks for another accelerator than the first one, which the Trainer would use nevertheless.
    """
    placement = place(device=device)
    found = accelerators()
    if placement.device == CPU:
        return CPU
    own = found[local_rank() % len(found)]
    if placement.device != own:
        kind, _, index = placement.device.partition(":")
        raise ConfigError(
            f"Found device {placement.device!r} for a training, which runs on {own}, the first one that is visible. "
            f"Make only that one visible, as with CUDA_VISIBLE_DEVICES={index} for CUDA, and ask for {kind!r}."
        )
    return own


def announce(placement: Placement, name: str) -> None:
    """Print on stderr where a model is placed, once for each distinct line of the process."""
    line = placement.line(name)
    if line not in _ANNOUNCED:
        _ANNOUNCED.add(line)
        say(line)


def accelerators() -> tuple[str, ...]:
    """Names of the accelerators that this process can use, such as cuda:0; empty on a machine without."""
    import torch

    if not torch.accelerator.is_available():
        return ()
    kind = torch.accelerator.current_accelerator()
    return () if kind is None else tuple(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))


def has_instructions(dtype: str) -> bool:
    """True if this CPU multiplies matrices of a 16-bit type without converting every number."""
    import torch

    try:
        return bool(getattr(torch.ops.mkldnn, _INSTRUCTIONS[dtype])())
    except (AttributeError, RuntimeError):
        # a build without oneDNN
        return False


def free_memory() -> int:
    """Bytes of the machine's memory that new processes can use."""
    import psutil

    return int(psutil.virtual_memory().available)


def device_memory(device: str) -> int:
    """Bytes of a device's memory, used or not.

    Args:
        device: Device by name, such as cpu or cuda:0.
    """
    import psutil
    import torch

    # the modules of accelerators are untyped; those of some kinds report no properties
    module: Any = None if device == CPU else torch.get_device_module(device)
    if hasattr(module, "get_device_properties"):
        return int(module.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _device(name: str | None) -> tuple[str, str]:
    """Device of this process and the reason for it."""
    found = accelerators()
    own = found[local_rank() % len(found)] if found else None
    if name is None:
        if own is None:
            return CPU, "no accelerator found"
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return CPU, "accelerate launch --cpu"
        return own, "accelerator found" if processes_here() == 1 else f"accelerator of process {local_rank()}"
    if name == CPU:
        return CPU, "device given"
    if name == ACCELERATOR and own is not None:
        return own, "accelerator required"
    kind, colon, _ = name.partition(":")
    if own is not None and not colon and own.startswith(f"{kind}:"):
        return own, "device given"
    if name not in found:
        there = ", ".join((CPU, *found))
        raise ConfigError(f"Found device {name!r}, which this machine does not have. Expected one of: {there}.")
    if processes_here() > 1:
        raise ConfigError(
            f"Found device {name!r} for {processes_here()} processes, which would share it. Expected {kind!r}: each "
            "process then takes its own."
        )
    return name, "device given"
