"""Derived training settings."""

from __future__ import annotations

import pytest

from graftwork.errors import ConfigError
from graftwork.settings.training import TrainingSettings


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({}, False),
        ({"load_best_model_at_end": True}, True),
        ({"early_stopping": 3}, True),
        ({"load_best_model_at_end": True, "early_stopping": 3}, True),
    ],
)
def test_the_best_checkpoint_is_kept_with_either_setting(settings, keeps):
    assert TrainingSettings(tasks=("t",), validation="dev", **settings).keeps_best is keeps


@pytest.mark.parametrize("settings", [{"load_best_model_at_end": True}, {"early_stopping": 3}])
def test_keeping_the_best_checkpoint_needs_a_checkpoint_for_every_score(settings):
    with pytest.raises(ConfigError, match="every score needs a checkpoint"):
        TrainingSettings(tasks=("t",), validation="dev", eval_steps=5, save_steps=10, **settings)


@pytest.mark.parametrize(
    "settings", [{"warmup_ratio": 1.0}, {"warmup_ratio": -0.1}, {"warmup_ratio": 0.1, "warmup_steps": 3}]
)
def test_a_warmup_ratio_outside_0_to_1_or_together_with_steps_is_refused(settings):
    with pytest.raises(ConfigError, match="warmup"):
        TrainingSettings(tasks=("t",), **settings)
    assert TrainingSettings(tasks=("t",), warmup_ratio=0.1).warmup_ratio == 0.1


def test_packing_and_grouping_by_length_exclude_each_other():
    assert TrainingSettings(tasks=("t",), packing=True).packing
    assert TrainingSettings(tasks=("t",), train_sampling_strategy="group_by_length").packing is False
    with pytest.raises(ConfigError, match="Packing fills rows anyway"):
        TrainingSettings(tasks=("t",), packing=True, train_sampling_strategy="group_by_length")
