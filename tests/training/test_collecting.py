"""Phases that collect values in one pass instead of training."""

from __future__ import annotations

import torch
from torch import nn

from graftwork.settings.training import TrainingSettings
from graftwork.training.collecting import collect_phase
from graftwork.training.phases import Phase


class Collect(Phase):
    name = "collect"

    def __init__(self):
        self.batches, self.modes, self.finished = [], [], []

    def step(self, model, batch):
        self.batches.append(batch["numbers"].tolist())
        self.modes.append(model.training)
        return {}

    def finish(self, model, folder):
        self.finished.append((folder, folder.is_dir()))


def test_a_collecting_phase_receives_every_example_once_in_order_and_in_evaluation_mode(tmp_path):
    phase, model = Collect(), nn.Linear(1, 1).train()
    settings = TrainingSettings(tasks=("t",), per_device_train_batch_size=2)
    folder = tmp_path / "train" / "collect"
    closing = collect_phase(
        model, phase, range(10, 15), folder, settings, collate=lambda rows: {"numbers": torch.tensor(rows)}
    )
    assert phase.batches == [[10, 11], [12, 13], [14]]
    assert phase.modes == [False] * 3
    assert phase.finished == [(folder, True)]
    assert model.training
    assert closing["examples"] == 5.0
