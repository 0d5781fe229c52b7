"""Time, peak memory and memory saved for the backward pass, relative to a baseline measured in the same process.

All numbers are measured, never estimated.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from graftwork.errors import ConfigError

_PROCESS = Path("/proc/self")


@dataclass(slots=True)
class SavedTensors:
    """Record of the tensors that autograd saves for the backward pass; each storage is counted once."""

    shapes: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    """Shape of every saved tensor, repeated ones included."""
    _storages: dict[int, int] = field(default_factory=dict[int, int])
    # the address of a freed storage could be reused by a later one, which would then not be counted
    _alive: list[torch.UntypedStorage] = field(default_factory=list[torch.UntypedStorage])

    @property
    def bytes(self) -> int:
        """Total size of the distinct storages."""
        return sum(self._storages.values())

    def add(self, tensor: Tensor, ignored: Collection[int] = ()) -> None:
        """Record a saved tensor [...], unless its storage is among the `ignored` addresses or recorded already."""
        storage = tensor.untyped_storage()
        self.shapes.append(tuple(tensor.shape))
        if storage.data_ptr() not in ignored and storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._alive.append(storage)

    def release(self) -> None:
        """Drop the references to the storages, and keep their sizes."""
        self._alive.clear()


@contextmanager
def saved_tensors(ignore: Sequence[Tensor] = ()) -> Generator[SavedTensors, None, None]:
    """Record the tensors that autograd saves inside the block.

    Args:
        ignore: Tensors whose storage is not counted, such as weights.

    Yields:
        Record that is filled while the block runs.

    Example:
        >>> x = torch.ones(4, 8, requires_grad=True)
        >>> with saved_tensors() as saved:
        ...     y = x.exp()
        >>> saved.bytes
        128
    """
    record = SavedTensors()
    ignored = {tensor.untyped_storage().data_ptr() for tensor in ignore}

    def pack(tensor: Tensor) -> Tensor:
        record.add(tensor, ignored)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield record
    finally:
        record.release()


@dataclass(slots=True)
class PeakMemory:
    """Growth of memory during a block; valid once the block has ended."""

    bytes: int = 0
    method: str = ""
    """Source of the number: "cuda allocator" or that of another accelerator, "process high-water mark", or "sampled
    resident size"."""


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Generator[PeakMemory, None, None]:
    """Measure the growth of memory inside the block, relative to its start.

    On the CPU this is the high-water mark of the process, reset at the start. If the system does not permit the reset,
    the resident size is sampled every millisecond, which can miss a short peak.

    Args:
        device: Device of the computation.

    Yields:
        Record that is filled when the block ends.
    """
    record = PeakMemory()
    gc.collect()
    if torch.device(device).type != "cpu":
        yield from _accelerator_peak(record, torch.device(device))
    elif _reset_high_water_mark():
        record.method = "process high-water mark"
        before = _process_bytes("VmRSS")
        yield record
        record.bytes = max(0, _process_bytes("VmHWM") - before)
    else:
        yield from _sampled_peak(record)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Implementation of a computation, to be compared with others."""

    forward: Callable[[], Tensor]
    upstream: Tensor | None = None
    """Gradient of the result; None measures the forward pass only."""
    leaves: Sequence[Tensor] = ()
    """Inputs and weights; their gradients are reset after every run."""

    def run(self) -> None:
        """Run the forward pass once, and the backward pass if there is an upstream gradient."""
        output = self.forward()
        if self.upstream is not None:
            output.backward(self.upstream)  # pyright: ignore[reportUnknownMemberType]
        del output
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Measured cost of one candidate."""

    seconds: float
    """Median time over the rounds."""
    time_ratio: float
    """Median over the rounds of the candidate's time divided by the baseline's time in the same round."""
    saved_bytes: int
    """Bytes saved for the backward pass, without `ignore`; 0 without an upstream gradient."""
    peak_bytes: int
    """Growth of memory during one run, after inputs, weights and the upstream gradient are allocated."""
    low: float = 0.0
    """Shortest time over the rounds."""
    high: float = 0.0
    """Longest time over the rounds."""


def compare_costs(
    candidates: Mapping[str, Candidate],
    baseline: str,
    *,
    rounds: int = 5,
    ignore: Sequence[Tensor] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Cost]:
    """Measure candidates in interleaved rounds, so that other load of the machine affects all of them equally.

    Args:
        candidates: Candidates by name.
        baseline: Name of the candidate that `time_ratio` is relative to.
        rounds: Number of timed runs of each candidate, after a warm-up run and a run that measures memory.
        ignore: Tensors whose storage is not counted as saved.
        device: Device of the computation.

    Returns:
        Costs by name, in the given order.

    Raises:
        ConfigError: If there is no candidate named `baseline`, or `rounds` is below 1.
    """
    if baseline not in candidates or rounds < 1:
        raise ConfigError(
            f"baseline is {baseline!r} and rounds is {rounds}. Expected one of: {', '.join(candidates)}; "
            "and 1 round or more."
        )
    saved: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for name, candidate in candidates.items():
        saved[name] = 0
        # the warm-up run pays for lazy initialisation
        candidate.run()
        with peak_memory(device) as peak:
            candidate.run()
        peaks[name] = peak.bytes
        if candidate.upstream is not None:
            with saved_tensors(ignore) as record:
                candidate.forward()
            saved[name] = record.bytes
    times = interleaved_times({name: candidate.run for name, candidate in candidates.items()}, rounds, device)
    return {
        name: Cost(
            statistics.median(times[name]),
            statistics.median(own / base for own, base in zip(times[name], times[baseline], strict=True)),
            saved[name],
            peaks[name],
            min(times[name]),
            max(times[name]),
        )
        for name in candidates
    }


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Time all runs in interleaved rounds.

    Args:
        runs: Functions to call, by name.
        rounds: Number of calls of each.
        device: Device of the computation; a GPU is synchronised before and after each call.

    Returns:
        Seconds of each call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            times[name].append(time.perf_counter() - start)
    return times


def _synchronise(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def _accelerator_peak(record: PeakMemory, device: torch.device) -> Generator[PeakMemory, None, None]:
    record.method = f"{device.type} allocator"
    allocator = torch.get_device_module(device)
    torch.accelerator.synchronize(device)
    allocator.reset_peak_memory_stats(device)
    before = allocator.memory_allocated(device)
    yield record
    torch.accelerator.synchronize(device)
    record.bytes = allocator.max_memory_allocated(device) - before


def _reset_high_water_mark() -> bool:
    _return_free_memory()
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    # some kernels accept the write without effect, and some report no VmHWM
    try:
        return _process_bytes("VmHWM") <= _process_bytes("VmRSS") + (1 << 20)
    except (OSError, LookupError):
        return False


def _return_free_memory() -> None:
    """Return freed memory to the system; otherwise new tensors would reuse it and the peak would miss them."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        # not the GNU C library, which alone has malloc_trim
        return


def _process_bytes(name: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _resident_bytes() -> int:
    try:
        return _process_bytes("VmRSS")
    except (OSError, LookupError):
        # macOS and Windows have no /proc
        import psutil

        return psutil.Process().memory_info().rss


def _sampled_peak(record: PeakMemory) -> Generator[PeakMemory, None, None]:
    record.method = "sampled resident size"
    before = highest = _resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield record
    finally:
        highest = max(highest, _resident_bytes())
        done.set()
        sampler.join()
        record.bytes = highest - before
