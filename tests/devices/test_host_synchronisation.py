"""Layers on an accelerator: what they compute without waiting equals what they compute with values in sight."""

from __future__ import annotations

import pytest
import torch

from graftwork.methods.sparsefinder import any_alpha
from graftwork.methods.sparsefinder import entmax as solver
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.modules import SparsefinderAttention
from graftwork.metrics.fake_tensors import fake_tensors
from graftwork.metrics.memory import MemoryRecorder


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
@pytest.mark.parametrize("keys", [17, 4096])
def test_a_fixed_number_of_newton_steps_reaches_the_threshold(keys, scale, monkeypatch):
    scores = torch.randn(32, keys, generator=torch.Generator().manual_seed(0)) * scale
    expected = [solver.entmax(scores.double(), alpha) for alpha in (1.1, 1.5, 2.0)]
    for module in (solver, any_alpha):
        monkeypatch.setattr(module, "tests_convergence", lambda _: False)
    for alpha, weights in zip((1.1, 1.5, 2.0), expected, strict=True):
        torch.testing.assert_close(solver.entmax(scores, alpha).double(), weights, rtol=0, atol=1e-6)


def test_the_state_of_a_module_is_read_again_only_after_a_change():
    config = SparsefinderConfig(grouping="quantize", threshold=0.5)
    graft = SparsefinderAttention(config, 2, 8, causal=False, cross=False, number=0)
    assert not graft.predicts
    graft.active.fill_(True)
    assert graft.predicts
    graft.load_state_dict({**graft.state_dict(), "active": torch.tensor(False)})
    assert not graft.predicts
    with fake_tensors(), MemoryRecorder() as recorder:
        module = SparsefinderAttention(config, 2, 8, causal=False, cross=False, number=0).to("cuda:0")
        _ = [module.predicts for _ in range(5)]
    assert sum(recorder.syncs.values()) == 1
