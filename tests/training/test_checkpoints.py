"""Damaged checkpoints: training resumes from the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftwork.training.checkpoints import last_checkpoint, remove_incomplete


@pytest.fixture
def phase(tmp_path: Path) -> Path:
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(1000)}, folder / "model.safetensors")
        torch.save({"state": torch.zeros(1000)}, folder / "optimizer.pt")
        torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text('{"global_step": 10}')
    return tmp_path


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"\0" * 500) + 100] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("model.safetensors", _cut),
    ("model.safetensors", _empty),
    ("optimizer.pt", _cut),
    ("optimizer.pt", _flip),
    ("rng_state.pth", _empty),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_line(name, damage, phase, caplog):
    assert last_checkpoint(phase) == phase / "checkpoint-20"
    damage(phase / "checkpoint-20" / name)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(phase) == phase / "checkpoint-10"
    assert len(caplog.messages) == 1
    assert f"checkpoint-20 is damaged ({name}: " in caplog.text


def test_a_checkpoint_with_an_unreadable_state_is_passed_over(phase):
    (phase / "checkpoint-20" / "trainer_state.json").write_bytes(b"[" * 100_000)
    assert last_checkpoint(phase) == phase / "checkpoint-10"


@pytest.mark.parametrize(("name", "removed"), [("trainer_state.json", True), ("model.safetensors", False)])
@pytest.mark.parametrize("damage", [_cut, _empty])
def test_a_checkpoint_that_was_never_complete_is_removed(name, removed, damage, phase):
    (phase / "checkpoint-30").mkdir()
    (phase / "checkpoint-best").mkdir()
    damage(phase / "checkpoint-20" / name)
    remove_incomplete(phase)
    assert not (phase / "checkpoint-30").exists()
    assert (phase / "checkpoint-20").exists() != removed
    assert (phase / "checkpoint-10" / name).exists()
    assert (phase / "checkpoint-best").exists()
