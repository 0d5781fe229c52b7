"""Published numbers in the WT5 recipes against tables transcribed from the paper."""

from importlib.resources import files

import pytest

from graftwork.settings.recipe import load_recipe, recipe_names
from graftwork.tasks import get_task
from graftwork.tasks.loading import training_tasks
from graftwork.tasks.task import metric_names

NAMES = [name for name in recipe_names() if name.startswith("wt5/")]

MAIN = {
    "t5-base": {
        "esnli": (90.9, 32.4),
        "cos_e": (59.4, 4.63),
        "movie_rationales": (98.0, 32.7),
        "eraser_multi_rc": (77.8, 69.9),
    },
    "t5-11b": {
        "esnli": (92.3, 33.7),
        "cos_e": (82.7, 5.17),
        "movie_rationales": (99.0, 31.5),
        "eraser_multi_rc": (86.6, 76.9),
    },
}
"""Label score and explanation score of the main table, by model and data set."""

FEW = {
    "esnli": """
        all 50000 20000 10000 5000 2000 1000 500 200 100
        93.46 94.18 93.83 93.68 93.98 93.95 94.22 94.08 94.10 94.05
        35.0 34.9 34.4 33.8 34.1 33.3 32.5 30.8 29.9 27.7""",
    "cos_e": """
        all 5000 2000 1000 500 200 100
        82.7 82.7 82.4 83.5 82.8 82.9 83.2
        5.17 5.7 5.2 6.0 5.3 4.4 5.0""",
    "movie_rationales": """
        all 1000 500 200
        98.5 98.5 97.5 98.0
        32.1 30.4 20.8 5.9""",
}
"""Rows of the 11B figure: number of explanations, accuracy, explanation score."""

TRANSFER = {"imdb_transfer", "mnli_transfer", "cos_e_transfer", "amazon_transfer"}


@pytest.mark.parametrize("model", MAIN)
@pytest.mark.parametrize("dataset", MAIN["t5-base"])
def test_recipes_contain_the_main_table(model, dataset):
    recipe = load_recipe(f"wt5/{model}_{dataset}")
    assert recipe.model == f"google-t5/{model}"
    assert tuple(number.value for number in recipe.published) == MAIN[model][dataset]
    assert recipe.evaluate.split == ("validation" if dataset == "cos_e" else "test")


@pytest.mark.parametrize("dataset", FEW)
def test_recipes_contain_the_figure_on_fewer_explanations(dataset):
    counts, accuracies, seconds = (line.split() for line in FEW[dataset].strip().splitlines())
    recipe = load_recipe(f"wt5/t5-11b_{dataset}_few")
    points = recipe.over["train.mixture"]
    assert [point.split("_")[-2] if point.endswith("_explanations") else "all" for point in points] == counts
    found = {(number.at["train.mixture"], number.metric == "accuracy"): number.value for number in recipe.published}
    for point, accuracy, second in zip(points, accuracies, seconds, strict=True):
        assert (found[point, True], found[point, False]) == (float(accuracy), float(second))
    assert len(found) == len(recipe.published) == 2 * len(points)


def test_the_experiment_of_the_authors_readme_has_a_recipe():
    recipe = load_recipe("wt5/t5-11b_movie_rationales_1000_explanations")
    assert recipe.train.mixture == "movie_rationales_1000_explanations"
    assert (recipe.train.max_steps, recipe.train.save_steps, recipe.train.save_total_limit) == (20000, 100, None)
    assert (recipe.train.tokens_per_batch, recipe.train.sequences_per_step) == (65536, 32)
    assert (recipe.train.optim, recipe.train.learning_rate, recipe.train.lr_scheduler_type) == (
        "adafactor",
        1e-3,
        "constant",
    )
    assert [number.value for number in recipe.published] == [98.5, 30.4]


def test_every_recipe_belongs_to_a_table():
    expected = {f"{model}_{dataset}" for model, row in MAIN.items() for dataset in row}
    expected |= {f"t5-11b_{dataset}_few" for dataset in FEW} | {f"t5-11b_{name}" for name in TRANSFER}
    assert {name.removeprefix("wt5/") for name in NAMES} == expected | {"t5-11b_movie_rationales_1000_explanations"}


@pytest.mark.parametrize("name", NAMES)
def test_every_published_number_is_measured_by_its_recipe(name):
    recipe = load_recipe(name)
    assert recipe.method == {"name": "wt5", "z_loss": 1e-4}
    for point in recipe.points():
        chosen = recipe.at(point)
        assert training_tasks(chosen.train)
    for task in recipe.evaluate.tasks:
        assert get_task(task).exposes(recipe.evaluate.split)
    for number in recipe.published:
        metrics = metric_names(get_task(number.task).in_mode(recipe.evaluate.mode).metrics)
        assert number.metric in metrics
        assert number.task in recipe.evaluate.tasks
        assert number.source.startswith("Narang et al. 2020")
    assert bool(recipe.published) != any(name.endswith(word) for word in TRANSFER)
    head = (files("graftwork") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"# Download: hf download {recipe.model}\n" in head
    assert f"# Run:      graftwork run {name} --data DATA\n" in head
