"""CALD recipes contain the published settings and no published numbers."""

from importlib.resources import files

import pytest
import yaml

from graftwork.pipeline.start import build_method
from graftwork.settings.recipe import load_recipe
from graftwork.tasks import get_task

FOLDER = files("graftwork") / "recipes" / "cald"
NAMES = sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir())
# warm-up and guided updates per task, from the authors' README
TASKS = {"qnli": (1964, 10000), "qqp": (6823, 40000), "sst2": (1263, 5000), "imdb": (469, 3000)}
GUIDES = {
    "dense": (32, 1),
    "unguided": (32, 1),
    "target": (16, 2),
    "trajectory": (16, 2),
    "waypoint": (16, 2),
    "hybrid": (16, 2),
}


def test_every_task_has_one_recipe_per_guide_and_a_search_grid():
    kinds = [*GUIDES, "search-grid"]
    assert sorted(f"roberta-base_{task}_{guide}" for task in TASKS for guide in kinds) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipes_contain_the_published_settings(name):
    _, task, guide = name.split("_")
    recipe = load_recipe(f"cald/{name}")
    assert recipe.model == "FacebookAI/roberta-base"
    assert recipe.train is not None
    assert recipe.train.warmup_steps == TASKS[task][0]
    assert recipe.train.num_train_epochs == 10
    assert recipe.train.max_grad_norm is None
    assert not recipe.published
    assert get_task(recipe.train.tasks[0]).labels
    shape = recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps
    assert shape == GUIDES.get(guide, (16, 2))
    for point in recipe.points():
        assert build_method(recipe.at(point).method or {}).name == "cald"
    if guide == "hybrid":
        assert recipe.method is not None
        assert recipe.method["distill_steps"] == TASKS[task][1]
    text = (FOLDER / f"{name}.yaml").read_text()
    assert yaml.safe_load(text)["evaluate"]["tasks"] == list(recipe.train.tasks)
    assert f"graftwork run cald/{name} " in text
    assert "ours" in text.split("model:")[0]
