"""Time, peak memory and saved bytes of a computation, always beside a baseline measured in the same process.

All numbers from here are measured, never modelled.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from graftwork.errors import ConfigError

_PROCESS = Path("/proc/self")


@dataclass(slots=True)
class SavedTensors:
    """Tensors that autograd keeps for a backward pass, each storage once."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of every saved tensor, repeated ones included."""
    _storages: dict[int, int] = field(default_factory=dict)
    # a storage that is freed could lend its address to the next one and hide it
    _alive: list[torch.UntypedStorage] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of all distinct storages."""
        return sum(self._storages.values())


@contextmanager
def saved_tensors(ignore: Sequence[Tensor] = ()) -> Iterator[SavedTensors]:
    """Record what autograd saves inside the block.

    Args:
        ignore: Tensors whose memory does not count, such as weights.

    Yields:
        The record, which fills as the block runs.

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
        storage = tensor.untyped_storage()
        record.shapes.append(tuple(tensor.shape))
        if storage.data_ptr() not in ignored and storage.data_ptr() not in record._storages:
            record._storages[storage.data_ptr()] = storage.nbytes()
            record._alive.append(storage)
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield record
    finally:
        record._alive.clear()


@dataclass(slots=True)
class PeakMemory:
    """Growth of memory over a block; valid once the block has ended."""

    bytes: int = 0
    method: str = ""
    """What was read: "cuda allocator", "process high-water mark", or "sampled resident size"."""


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Measure how far memory grows inside the block above where it stood before.

    On the CPU this is the high-water mark of the whole process, reset first; where the system does not permit that, the
    resident size is sampled every millisecond, which can miss a short peak.

    Args:
        device: Where the block computes.

    Yields:
        The record, filled when the block ends.
    """
    record = PeakMemory()
    gc.collect()
    if torch.device(device).type == "cuda":
        yield from _cuda_peak(record, torch.device(device))
    elif _reset_high_water_mark():
        record.method = "process high-water mark"
        before = _process_bytes("VmRSS")
        yield record
        record.bytes = max(0, _process_bytes("VmHWM") - before)
    else:
        yield from _sampled_peak(record)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute something, to be compared with others."""

    forward: Callable[[], Tensor]
    upstream: Tensor | None = None
    """Gradient of the result; None measures the forward pass alone."""
    leaves: Sequence[Tensor] = ()
    """Inputs and weights, whose gradients are dropped after every run."""

    def run(self) -> None:
        """Compute once, backward pass included if there is an upstream gradient."""
        output = self.forward()
        if self.upstream is not None:
            output.backward(self.upstream)
        del output
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What one candidate cost."""

    seconds: float
    """Median over the rounds."""
    time_ratio: float
    """Median over the rounds of its time divided by the baseline's in the same round."""
    saved_bytes: int
    """Kept for the backward pass, `ignore` left out; 0 without one."""
    peak_bytes: int
    """Growth over one run, once inputs, weights and the upstream gradient exist."""


def compare_costs(
    candidates: Mapping[str, Candidate],
    baseline: str,
    *,
    rounds: int = 5,
    ignore: Sequence[Tensor] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Cost]:
    """Measure candidates in turns, so that whatever else the machine does falls on all of them alike.

    Args:
        candidates: What to compare, by name.
        baseline: Name of the one that the others are divided by.
        rounds: Timed runs of each, after one that warms up and counts memory.
        ignore: Tensors whose storage does not count as saved.
        device: Where the candidates compute.

    Returns:
        Costs by name, in the given order.

    Raises:
        ConfigError: If there is no candidate called `baseline`, or no round.
    """
    if baseline not in candidates or rounds < 1:
        raise ConfigError(
            f"baseline is {baseline!r} and rounds is {rounds}. Expected one of: {', '.join(candidates)}; "
            "and 1 round or more."
        )
    saved, peaks = {}, {}
    for name, candidate in candidates.items():
        saved[name] = 0
        # the first run also pays for lazy initialisation, so it comes before the one that is measured
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
        )
        for name in candidates
    }


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Time every run once per round, in turns.

    Args:
        runs: What to call, by name.
        rounds: Calls of each.
        device: Where the runs compute; a GPU is waited for.

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
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _cuda_peak(record: PeakMemory, device: torch.device) -> Iterator[PeakMemory]:
    record.method = "cuda allocator"
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield record
    torch.cuda.synchronize(device)
    record.bytes = torch.cuda.max_memory_allocated(device) - before


def _reset_high_water_mark() -> bool:
    _return_free_memory()
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    # some kernels accept the write and do nothing, and some show no mark at all
    try:
        return _process_bytes("VmHWM") <= _process_bytes("VmRSS") + (1 << 20)
    except (OSError, LookupError):
        return False


def _return_free_memory() -> None:
    """Give memory that was freed before back to the system, or new tensors would reuse it unseen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        # not the GNU C library, so there is nothing to ask
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
        import resource

        # where /proc is missing only a mark that never falls can be had
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _sampled_peak(record: PeakMemory) -> Iterator[PeakMemory]:
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
