"""Leakage-adjusted simulatability against its definition, and on answers whose scores are known."""

import math
import random

import pytest

from graftwork.metrics.simulatability import leakage_adjusted, simulatability


def published(both, alone, leak):
    """Definition of the paper: mean difference in each group of leaking and other answers, and their mean."""
    terms = {}
    for group in (1, 0):
        chosen = [i for i, k in enumerate(leak) if k == group]
        terms[group] = sum(both[i] for i in chosen) / len(chosen) - sum(alone[i] for i in chosen) / len(chosen)
    return 100 * (terms[1] + terms[0]) / 2, 100 * terms[1], 100 * terms[0]


def test_las_is_the_mean_of_the_differences_in_both_groups():
    generator = random.Random(0)
    both, alone, leak = ([generator.randrange(2) for _ in range(50)] for _ in range(3))
    assert leakage_adjusted(both, alone, leak) == pytest.approx(published(both, alone, leak))
    las, leaking, nonleaking = leakage_adjusted([True], [False], [False])
    assert nonleaking == 100
    assert math.isnan(leaking)
    assert math.isnan(las)


def answers(count, reason):
    generator = random.Random(1)
    inputs, reasons, labels = [], [], []
    for _ in range(count):
        first, second = generator.randrange(2), generator.randrange(2)
        label = ("wet", "dry")[first ^ second]
        inputs.append(f"{'sun' if first else 'rain'} {generator.choice('abc')}")
        reasons.append(reason(first, second, label))
        labels.append(label)
    return inputs, reasons, labels


def test_explanations_that_name_the_label_leak_it():
    found = simulatability(*answers(120, lambda first, second, label: f"it is {label}"))
    assert found.leaked_rate == 100
    assert found.accuracy > 95 > 70 > found.accuracy_without
    # without an answer in the other group there is no mean of both
    assert math.isnan(found.las)
    assert found.leaking == pytest.approx(found.accuracy - found.accuracy_without)


def test_explanations_without_meaning_help_nobody():
    found = simulatability(*answers(120, lambda first, second, label: "because"))
    assert found.accuracy == found.accuracy_without
    assert (found.leaking, found.nonleaking) == (0, 0)


def test_too_few_answers_and_a_single_label_have_no_scores():
    assert all(math.isnan(value) for value in simulatability(["a"] * 9, ["b"] * 9, ["x", "y", "z"] * 3))
    assert all(math.isnan(value) for value in simulatability(["a"] * 40, ["b"] * 40, ["x"] * 40))
