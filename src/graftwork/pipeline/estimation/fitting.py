"""Largest batch that fits into the memory of a device, and what it takes to fit at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from graftwork.errors import ConfigError
from graftwork.grafting.capabilities import Chunks
from graftwork.grafting.method import Method
from graftwork.pipeline.estimation.estimate import Estimator
from graftwork.pipeline.model_files import is_quantised_config
from graftwork.settings.training import TrainingSettings

RESERVE = 0.1
"""Share of a device's memory for what an estimate does not contain: context, workspaces, fragmentation."""
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MOST = 4096
"""Largest batch that is proposed."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings of training that fit into a device."""

    memory: int
    """Bytes of the device."""
    batch: int
    """Largest batch of one forward pass; 0 if not even one row fits."""
    settings: dict[str, Any]
    """Settings of training to change: batch size, accumulation, checkpointing."""
    method: dict[str, Any]
    """Settings of the method to change: size of the chunks into which it divides a batch."""
    peak: int
    """Bytes at that batch; at one row if it does not fit."""
    needs: str
    """Requirement besides these settings; empty if they suffice."""

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"label": "estimated"}


def parse_bytes(text: str) -> int:
    """Number of bytes of a size such as 24GB or 16GiB.

    Raises:
        ConfigError: If it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"Found the size {text!r}. Expected a number and a unit, such as 24GB or 16GiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def fit(
    estimator: Estimator, methods: Sequence[Method[Any]], settings: TrainingSettings, memory: int, processes: int = 1
) -> Fit:
    """Find the largest batch for a device; checkpointing is switched on only if one row needs it.

    The number of sequences per optimiser step stays as the settings have it: accumulation makes up for a smaller batch.
    A method that divides a batch into chunks of automatic size gets the smallest chunks for this search, and then the
    largest ones that fit with the batch that was found.

    Args:
        estimator: Estimates of the model.
        methods: Methods on the model.
        settings: Settings of the training.
        memory: Bytes of the device.
        processes: Number of devices, each with a batch of its own.
    """
    room = int(memory * (1 - RESERVE))
    chosen, small = settings, _chunked(methods, 1, MOST)
    one = _peak(estimator, small, chosen, 1)
    if one > room and not settings.gradient_checkpointing:
        chosen = replace(settings, gradient_checkpointing=True)
        one = _peak(estimator, small, chosen, 1)
    changed: dict[str, Any] = {} if chosen is settings else {"gradient_checkpointing": True}
    if one > room:
        return Fit(memory, 0, changed, _changes(methods, small), one, _needs(estimator, small, chosen, room))
    batch, peak = _largest(lambda size: _peak(estimator, small, chosen, size), room, one, MOST)
    effective = settings.sequences_per_step
    micro = max(size for size in range(1, min(batch, effective) + 1) if effective % size == 0)
    changed |= {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": effective // micro // processes or 1,
    }
    most = max((method.largest_chunk(micro) for method in methods if _is_chunked(method)), default=1)
    if most == 1:
        return Fit(memory, batch, changed, {}, peak, "")
    size, peak = _largest(
        lambda size: _peak(estimator, _chunked(methods, size, micro), chosen, micro),
        room,
        _peak(estimator, _chunked(methods, 1, micro), chosen, micro),
        most,
    )
    return Fit(memory, batch, changed, _changes(methods, _chunked(methods, size, micro)), peak, "")


def _is_chunked(method: Method[Any]) -> TypeGuard[Chunks]:
    return isinstance(method, Chunks) and method.chunk_setting is not None


def _chunked(methods: Sequence[Method[Any]], size: int, rows: int) -> list[Method[Any]]:
    """Methods with chunks of a given size where it is automatic."""
    return [method.chunked(size, rows) if _is_chunked(method) else method for method in methods]


def _changes(methods: Sequence[Method[Any]], chosen: Sequence[Method[Any]]) -> dict[str, Any]:
    """Settings of chunks that differ."""
    return {
        str(before.chunk_setting): getattr(after.config, str(before.chunk_setting))
        for before, after in zip(methods, chosen, strict=True)
        if _is_chunked(before)
    }


def _largest(peak_of: Callable[[int], int], room: int, one: int, most: int) -> tuple[int, int]:
    """Largest size whose peak fits, with its peak: extrapolated along the line through two estimates, then checked.

    Args:
        peak_of: Bytes at a size.
        room: Bytes that are available.
        one: Bytes at size 1, which fits.
        most: Largest size.
    """
    two = peak_of(2) if most > 1 else room + 1
    if two > room:
        return 1, one
    best, peak, slope = 2, two, max(1, two - one)
    upper = most
    for _ in range(4):
        guess = min(upper, max(best + 1, best + (room - peak) // slope))
        if guess <= best:
            break
        found = peak_of(guess)
        slope = max(1, -(-(found - peak) // (guess - best)))
        if found <= room:
            best, peak = guess, found
        else:
            upper = guess - 1
    return best, peak


def _peak(estimator: Estimator, methods: Sequence[Method[Any]], settings: TrainingSettings, batch: int) -> int:
    # accumulated gradients are in memory during the next pass, at any number of accumulation steps
    accumulation = min(2, settings.passes()[1])
    changed = replace(
        settings, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, tokens_per_batch=None
    )
    memory = estimator.training(methods, changed)[2]
    return 0 if memory is None else memory.peak


def _needs(estimator: Estimator, methods: Sequence[Method[Any]], settings: TrainingSettings, room: int) -> str:
    """Requirement of one row that does not fit: a quantised base if most weights are frozen, else more devices."""
    memory = estimator.training(methods, settings)[2]
    if memory is None:
        return ""
    if memory.gradients * 10 < memory.weights and not is_quantised_config(estimator.config):
        # an int8 base takes a byte for each number, an int4 base half of one
        size = estimator.dtype.itemsize
        for name, share in (("int8", 1 / size), ("int4", 0.5 / size)):
            if memory.peak - memory.weights * (1 - share) <= room:
                return f"a base quantised to {name}"
    return f"{-(-memory.peak // room)} devices with the weights sharded (arguments: fsdp)"
