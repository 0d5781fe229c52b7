"""Estimated memory in the files of recipes, against the estimate, and against the memory of one device."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from graftwork.settings.recipe import load_recipe, recipe_names

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "recipe_memory.py"
LINE = re.compile(
    r"^# Memory:   (?:training ([\d.]+) GB(?:, )?)?(?:evaluation ([\d.]+) GB)? \(estimated\): (one|\d+) devices?"
    r"(?: with the weights sharded)? of (\d+) GB$",
    re.M,
)
ESTIMATED = recipe_names()


def text_of(name):
    return (files("graftwork") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def script():
    spec = importlib.util.spec_from_file_location("recipe_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ESTIMATED)
def test_a_recipe_names_its_memory_and_fits_into_the_devices_it_names(name):
    training, evaluation, devices, memory = LINE.search(text_of(name)).groups()
    recipe = load_recipe(name)
    assert (training is None, evaluation is None) == (recipe.train is None, recipe.evaluate is None)
    count = 1 if devices == "one" else int(devices)
    assert max(float(training or 0), float(evaluation or 0)) <= 0.9 * count * float(memory)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cald/roberta-base_imdb_hybrid", "cald/roberta-base_sst2_dense"])
def test_the_memory_in_a_recipe_is_that_of_the_estimate(name):
    module = script()
    assert module.rewritten(text_of(name), module.figures(name)) == text_of(name)
