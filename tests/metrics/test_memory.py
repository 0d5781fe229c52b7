"""Accounting of memory and devices on fake and on real tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graftwork.metrics.fake_tensors import fake_tensors, generator_on, is_fake
from graftwork.metrics.memory import MemoryRecorder, bytes_of


def test_bytes_are_live_until_the_last_tensor_of_a_storage_is_freed():
    with MemoryRecorder() as recorder:
        whole = torch.zeros(1000)
        view = whole[:10]
        assert recorder.live_bytes == 4032  # 4,000 bytes in units of 64
        del whole
        assert recorder.live_bytes == 4032
        view.add_(1)
        del view
        assert recorder.live_bytes == 0
        assert recorder.peak_bytes == 4032
        recorder.reset_peak()
        assert recorder.peak_bytes == 0


def test_tensors_saved_for_backward_count():
    weight = torch.ones(100, 100, requires_grad=True)
    with MemoryRecorder() as recorder:
        loss = (weight * weight).exp().sum()
        # the square, and its exponential, are needed by the backward pass of exp and of nothing else
        assert recorder.live["cpu"] >= 40_000
        loss.backward()
        del loss
        assert recorder.live["cpu"] == 40_000 + 0  # the gradient alone
    assert weight.grad is not None


def test_fake_gpus_train_without_a_gpu_and_refuse_mixed_devices():
    with fake_tensors(), MemoryRecorder() as recorder:
        first, second = nn.Linear(8, 8, device="cuda:0"), nn.Linear(8, 8, device="cuda:1")
        inputs = torch.ones(4, 8, device="cuda:0")
        second(first(inputs).to("cuda:1")).sum().backward()
        assert first.weight.grad is not None
        assert (first.weight.grad.device.index, second.weight.grad.device.index) == (0, 1)
        with pytest.raises(RuntimeError, match="same device"):
            second(first(inputs))
    assert recorder.peak["cuda:0"] % 512 == 0
    assert recorder.peak["cuda:1"] >= 4 * 512
    assert not is_fake(torch.ones(1))


def test_values_of_a_device_are_counted_as_synchronisations():
    with fake_tensors(), MemoryRecorder() as recorder:
        mask = torch.ones(4, 5, device="cuda", dtype=torch.bool)
        assert not bool(mask.all())
        assert mask.nonzero().shape == (20, 2)
        assert mask.cpu().device.type == "cpu"
        assert torch.tensor(3).item() == 3
    assert sum(recorder.syncs.values()) == 3
    assert {site.split()[0] for site in recorder.syncs} == {"value", "size", "copy"}


def test_mixed_precision_and_checkpointing_work_on_fake_gpus():
    with fake_tensors():
        layer = nn.Linear(8, 8, device="cuda")
        inputs = torch.ones(2, 8, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert inputs.grad is not None


def test_nothing_of_torch_stays_changed():
    before = torch.utils.swap_tensors, torch.nn.functional.scaled_dot_product_attention
    with fake_tensors():
        pass
    assert (torch.utils.swap_tensors, torch.nn.functional.scaled_dot_product_attention) == before
    if torch.version.cuda is None:
        with FakeTensorMode(), pytest.raises(RuntimeError, match="not linked"):
            torch.ones(2, device="cuda").uniform_()


def test_fake_modules_are_moved_and_copied():
    with fake_tensors():
        module = nn.BatchNorm1d(4)
        other = copy.deepcopy(module).to("cuda:1")
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
        assert {str(tensor.device) for tensor in other.state_dict().values()} == {"cuda:1"}
    assert bytes_of([torch.zeros(4), torch.zeros(4)]) == 32


def test_a_generator_needs_its_device():
    assert generator_on(torch.device("cpu"), 3).initial_seed() == 3
    if not torch.cuda.is_available():
        assert generator_on(torch.device("cuda"), 3) is None
