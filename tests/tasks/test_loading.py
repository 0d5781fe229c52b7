"""Loading of training and validation examples by task name."""

from __future__ import annotations

import pytest

from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_training, load_validation


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("load", [lambda *args: load_training(*args).examples, load_validation])
def test_lowercase_applies_to_training_and_validation_examples(write, load, lowercase):
    for split in ("train", "dev"):
        rows = write(f"openbookqa/{split}.tsv", "Who Is Ada?\tA Countess\n")
    settings = TrainingSettings(tasks=("unifiedqa/openbookqa",), validation="dev", lowercase=lowercase)
    (examples,) = load(settings, rows.parents[1], 0)
    expected = ("who is ada?", "a countess") if lowercase else ("Who Is Ada?", "A Countess")
    assert [(row.input, row.target) for row in examples.rows] == [expected]
