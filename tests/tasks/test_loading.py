"""Loading of training and validation examples by task name."""

from __future__ import annotations

import json

import pytest

from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_training, load_validation


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("load", [lambda *args: load_training(*args).examples, load_validation])
def test_lowercase_applies_to_training_and_validation_examples(write, load, lowercase):
    rows = write("rows.jsonl", json.dumps({"input": "Who Is Ada?", "target": "A Countess"}) + "\n")
    settings = TrainingSettings(tasks=(str(rows),), validation="dev", lowercase=lowercase)
    (examples,) = load(settings, None, 0)
    expected = ("who is ada?", "a countess") if lowercase else ("Who Is Ada?", "A Countess")
    assert [(row.input, row.target) for row in examples.rows] == [expected]
