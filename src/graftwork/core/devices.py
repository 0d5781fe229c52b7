"""Placement of models: device, device map and data type. Every loader calls `place`; nothing else decides devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from graftwork.core.messages import say
from graftwork.core.processes import local_rank, processes_here
from graftwork.errors import ConfigError

CPU = "cpu"
WIDE = "float32"
"""Type of computation on a CPU that lacks instructions for the type of the checkpoint."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps of accelerate, by name."""

_INSTRUCTIONS = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
_ANNOUNCED: set[str] = set()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model is loaded, and in which type it computes."""

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
        options: dict[str, Any] = {"dtype": "auto" if self.dtype is None or self.widened else self.dtype}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        elif self.device != CPU:
            # directly, without a copy in the memory of the CPU
            options["device_map"] = {"": self.device}
        return options

    def line(self, name: str) -> str:
        """One line for people: device, type and the reasons."""
        place = self.device if self.device_map is None else f"the devices of device map {self.device_map!r}"
        reasons = ", ".join(part for part in (self.where, self.why) if part)
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
        device: Device by name (cpu, cuda, cuda:1, xpu, mps); None chooses.
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
    chosen, where = _device(device)
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
    free = free_memory()
    if size is not None and free is not None and 2 * size > free:
        why = f"{lacks}, but float32 does not fit into the free {free / 1e9:.1f} GB"
        return Placement(chosen, stored, device_map, stored, where=where, why=why)
    why = f"{lacks}; dtype {stored} keeps it"
    return Placement(chosen, WIDE, device_map, stored, widened=True, where=where, why=why)


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


def free_memory() -> int | None:
    """Bytes of memory that new processes can use; None if the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def describe_devices() -> str:
    """Accelerators with their names, or the CPU with its threads and 16-bit types; for `graftwork doctor`."""
    import torch

    found = accelerators()
    if found:
        return ", ".join(f"{name} ({_label(name)})" for name in found)
    halves = [name for name in _INSTRUCTIONS if has_instructions(name)]
    types = f"instructions for {', '.join(halves)}" if halves else "no instructions for bfloat16 or float16"
    return f"cpu, {torch.get_num_threads()} threads, {types}"


def _label(name: str) -> str:
    import torch

    module = getattr(torch, name.partition(":")[0], None)
    get = getattr(module, "get_device_name", None)
    return str(get(int(name.partition(":")[2]))) if get is not None else "no name"


def _device(name: str | None) -> tuple[str, str]:
    """Device of this process and the reason for it."""
    found = accelerators()
    own = found[local_rank() % len(found)] if found else None
    if name is None:
        if own is None:
            return CPU, "no accelerator found"
        return own, "accelerator found" if processes_here() == 1 else f"accelerator of process {local_rank()}"
    if name == CPU:
        return CPU, "device given"
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
