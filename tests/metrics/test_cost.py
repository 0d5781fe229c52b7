import mmap
import threading
import time

import pytest
import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.metrics import cost
from graftwork.metrics.cost import Candidate, compare_costs, interleaved_times, peak_memory, saved_tensors

MEBIBYTE = 1 << 20


def test_saved_bytes_count_each_storage_once() -> None:
    x = torch.ones(100, 25, requires_grad=True)
    with saved_tensors() as saved:
        # exp saves its result; the product saves both factors, one of them that same result
        y = x.exp() * x
    assert saved.bytes == 2 * 100 * 25 * 4
    assert saved.shapes.count((100, 25)) == 3
    y.sum().backward()


def test_views_count_as_the_memory_that_they_keep_alive() -> None:
    x = torch.ones(1000, requires_grad=True)
    whole = torch.ones(1000)
    with saved_tensors([x]) as saved:
        _ = x[:10] * whole[:10]
    assert saved.bytes == 4000


def test_ignored_tensors_do_not_count() -> None:
    x, weight = torch.ones(4, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    with saved_tensors([weight]) as saved:
        _ = x @ weight.t()
    assert saved.bytes == 4 * 3 * 4


def test_nothing_outside_the_block_counts() -> None:
    x = torch.ones(10, requires_grad=True)
    with saved_tensors() as saved:
        pass
    _ = x.exp()
    assert saved.bytes == 0


def test_a_storage_freed_inside_the_block_still_counts() -> None:
    x = torch.ones(1 << 16, requires_grad=True)
    with saved_tensors([x]) as saved:
        for _ in range(4):
            _ = x.exp()
    assert saved.bytes == 4 * 4 * (1 << 16)


def pages(mebibytes: int) -> mmap.mmap:
    """Pages that the process has never had and gives back when closed, which an allocator is free not to do."""
    held = mmap.mmap(-1, mebibytes * MEBIBYTE)
    for start in range(0, len(held), mmap.PAGESIZE):
        held[start] = 1
    return held


def grow(mebibytes: int) -> None:
    pages(mebibytes).close()


@pytest.mark.parametrize("permitted", [True, False])
def test_peak_memory_includes_memory_freed_inside_the_block(permitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not permitted:
        monkeypatch.setattr(cost, "_reset_high_water_mark", lambda: False)
    looked = threading.Event()
    resident_bytes = cost._resident_bytes

    def look() -> int:
        found = resident_bytes()
        looked.set()
        return found

    monkeypatch.setattr(cost, "_resident_bytes", look)
    with peak_memory() as peak:
        grow(128)
        held = pages(96)
        # the sampled form must have looked: the first look may have begun before the memory was there
        for _ in range(2 if not permitted else 0):
            looked.clear()
            assert looked.wait(60)
        held.close()
    assert peak.method in ("process high-water mark", "sampled resident size")
    assert (90 if peak.method.startswith("sampled") else 120) * MEBIBYTE < peak.bytes < 200 * MEBIBYTE


def test_each_block_measures_its_own_peak() -> None:
    with peak_memory() as first:
        grow(128)
    with peak_memory() as second:
        grow(16)
    assert second.bytes < 64 * MEBIBYTE
    assert second.bytes < first.bytes or first.method.startswith("sampled")


def test_runs_are_interleaved() -> None:
    calls: list[str] = []
    times = interleaved_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_costs_are_relative_to_the_baseline() -> None:
    x = torch.ones(64, 64, requires_grad=True)

    def slow() -> Tensor:
        time.sleep(0.03)
        return x * 2

    def slower() -> Tensor:
        time.sleep(0.09)
        return x.exp() * 2

    upstream = torch.ones(64, 64)
    costs = compare_costs(
        {"slow": Candidate(slow, upstream, [x]), "slower": Candidate(slower, upstream, [x])}, "slow", rounds=3
    )
    assert list(costs) == ["slow", "slower"]
    assert costs["slow"].time_ratio == 1.0
    assert all(0 < cost.low <= cost.seconds <= cost.high for cost in costs.values())
    assert 1.2 < costs["slower"].time_ratio < 4
    assert costs["slow"].saved_bytes == 0
    assert costs["slower"].saved_bytes == 64 * 64 * 4
    assert x.grad is None


def test_without_an_upstream_gradient_only_the_forward_pass_runs() -> None:
    x = torch.ones(4, requires_grad=True)
    costs = compare_costs({"only": Candidate(lambda: x.exp())}, "only", rounds=1)
    assert costs["only"].saved_bytes == 0
    assert x.grad is None


def test_an_unknown_baseline_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"baseline is 'dense'.*Expected one of: only"):
        compare_costs({"only": Candidate(lambda: torch.ones(1))}, "dense")
