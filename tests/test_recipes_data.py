"""Published numbers in the top-k recipes against tables transcribed from the authors' repository."""

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
import yaml

from graftwork.tasks import get_task

ZERO_SHOT = {
    "base": """
k: off 1024 512 256 128 64 32 16
squad1_1: 81.1/88.4 81.1/88.4 81.1/88.4 81.0/88.4 81.1/88.4 80.7/87.9 79.0/86.8 74.9/83.7
squad2: 75.1/79.1 75.1/79.1 75.1/79.1 75.2/79.1 75.3/79.2 75.6/79.5 74.9/79.1 73.3/77.9
race_string: 69.6/75.2 69.6/75.2 69.5/75.2 69.5/75.2 69.7/75.2 69.4/74.9 68.5/74.2 65.9/72.2
mctest: 85.3/89.3 85.3/89.3 85.3/89.3 85.3/89.3 85.0/89.0 86.2/89.7 85.9/89.5 82.8/87.3
arc_easy: 54.7/62.9 54.7/62.9 54.6/62.7 54.2/62.5 54.0/62.2 53.2/61.1 52.3/60.6 47.7/56.7
arc_hard: 44.8/57.5 44.8/57.5 44.8/57.5 44.1/56.8 45.2/57.6 45.8/58.2 42.1/55.7 42.1/56.1
boolq: 82.0/82.0 82.0/82.0 82.0/82.0 82.0/82.0 82.1/82.1 81.9/81.9 80.3/80.3 76.6/76.7
openbookqa: 59.6/66.3 59.6/66.3 59.4/66.1 59.6/66.3 60.4/67.1 58.8/65.9 56.8/63.9 55.4/61.9
narrativeqa: 26.8/46.4 26.8/46.4 26.8/46.4 26.9/46.3 26.9/46.3 26.6/45.9 25.6/44.7 24.4/42.9
commonsenseqa: 45.0/45.6 45.0/45.6 45.0/45.6 45.0/45.5 45.1/45.7 45.6/46.2 43.9/44.7 44.1/44.8
mean: 62.40/69.27 62.40/69.27 62.36/69.23 62.28/69.14 62.48/69.28 62.38/69.12 60.93/67.95 58.72/66.02
""",
    "3b": """
k: off 2048 1024 512 256 128 64 32 16
squad1_1: 86.3/92.9 86.3/92.9 86.3/92.9 86.4/93.0 86.3/92.8 85.9/92.4 84.9/91.7 82.7/90.3 76.2/85.8
squad2: 84.2/88.0 84.2/88.0 84.3/88.0 84.4/88.1 84.5/88.2 84.6/88.2 83.9/87.7 81.6/85.9 71.7/78.6
race_string: 83.9/87.3 83.9/87.3 83.9/87.3 83.9/87.3 84.1/87.4 83.5/87.0 82.2/85.9 78.7/83.0 69.8/76.1
mctest: 92.8/95.2 92.8/95.2 92.8/95.2 92.8/95.2 93.1/95.4 93.1/95.7 93.1/95.2 91.9/93.8 87.2/90.0
arc_easy: 78.6/83.2 78.6/83.2 78.6/83.2 77.9/82.6 77.0/82.0 76.8/81.7 75.6/81.0 71.9/77.6 61.2/68.9
arc_hard: 70.2/78.3 70.2/78.3 69.6/77.8 68.9/77.4 69.6/77.7 68.2/77.9 62.5/72.9 59.2/69.1 51.8/65.2
boolq: 89.6/89.6 89.6/89.6 89.5/89.5 89.3/89.3 89.3/89.3 88.7/88.7 88.1/88.1 85.0/85.0 80.6/80.9
openbookqa: 78.8/82.5 78.8/82.5 79.4/83.1 79.2/82.9 78.8/82.5 78.0/81.6 77.6/80.9 72.6/76.0 62.8/69.5
narrativeqa: 30.8/51.6 30.8/51.6 30.8/51.6 30.9/51.6 30.8/51.5 30.4/51.1 29.7/50.2 28.6/48.4 24.7/43.7
commonsenseqa: 71.8/72.3 71.8/72.3 71.7/72.1 71.7/72.2 71.9/72.4 70.5/70.9 70.2/70.6 65.5/66.1 57.5/58.6
mean: 76.70/82.09 76.70/82.09 76.69/82.07 76.54/81.96 76.54/81.92 75.97/81.52 74.78/80.42 71.77/77.52 64.35/71.73
""",
    "11b": """
k: off 4096 2048 1024 512 256 128 64
squad1_1: 87.0/93.3 87.0/93.3 87.0/93.3 87.0/93.3 86.9/93.2 86.8/93.3 86.8/93.4 86.1/93.2
squad2: 86.3/89.8 86.3/89.8 86.3/89.8 86.3/89.8 86.2/89.8 85.7/89.3 84.3/88.0 82.0/85.9
race_string: 87.4/90.1 87.4/90.1 87.3/90.1 87.3/90.1 87.2/90.0 86.8/89.6 85.8/88.9 83.5/87.0
mctest: 93.1/94.9 93.1/94.9 93.1/94.9 93.1/94.9 93.1/94.9 92.8/94.8 93.1/95.0 92.8/94.8
arc_easy: 86.0/88.5 86.0/88.5 85.8/88.4 86.3/88.7 85.4/87.8 85.3/87.7 83.5/86.6 79.3/83.6
arc_hard: 75.6/82.4 75.6/82.4 75.9/82.7 76.3/82.9 75.9/82.3 75.6/82.7 72.2/79.6 71.6/79.7
boolq: 90.7/90.7 90.8/90.8 90.8/90.8 90.7/90.7 90.4/90.4 90.0/90.0 89.7/89.7 88.7/89.1
openbookqa: 85.2/87.8 85.2/87.8 85.0/87.7 85.0/87.7 83.6/86.8 85.4/88.2 80.0/83.9 77.4/81.4
narrativeqa: 32.3/53.1 32.3/53.1 32.3/53.1 32.3/53.1 32.3/53.1 32.1/53.0 31.6/52.3 30.5/51.3
commonsenseqa: 77.5/77.8 77.6/77.9 77.2/77.6 77.2/77.6 77.0/77.3 75.9/76.3 74.8/75.2 72.4/72.8
ai2_science_elementary: 91.9/93.5 91.9/93.5 91.9/93.5 91.9/93.5 91.1/92.7 91.1/92.3 87.8/90.1 82.9/86.4
ai2_science_middle: 82.4/88.6 82.4/88.6 82.4/88.6 83.2/88.9 84.0/88.9 84.0/89.1 81.6/86.9 77.6/84.1
mean: 81.28/85.88 81.30/85.89 81.25/85.88 81.38/85.93 81.09/85.60 80.96/85.52 79.27/84.13 77.07/82.44
""",
}
"""EM/F1 by number of kept units; the means over the columns detect transcription errors."""

# untuned EM, batch × accumulation, tuned dense F1/EM, tuned k=256 F1/EM
FINE_TUNED = {
    "commonsenseqa": (35.7, (192, 3), (62.9, 61.9), (63.0, 62.0)),
    "openbookqa": (17.0, (128, 4), (65.1, 58.8), (64.0, 58.0)),
    "boolq": (0.5, (16, 5), (83.3, 83.3), (83.1, 83.1)),
    "ropes": (21.7, (16, 5), (61.5, 54.0), (62.3, 53.8)),
    "mctest_corrected_the_separator": (36.6, (16, 5), (85.6, 81.2), (84.7, 79.4)),
}
UNIFIEDQA_ROPES = 26.3

SMALL = {
    "openbookqa",
    "arc_easy",
    "arc_hard",
    "mctest_corrected_the_separator",
    "ai2_science_elementary",
    "ai2_science_middle",
}
"""Data sets whose dev split has fewer than 1000 rows, so that one question has more weight."""

FOLDER = files("graftwork") / "recipes" / "topk"
NAMES = sorted(file.name for file in FOLDER.iterdir())
K = "method.feed_forward_k"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def scores(recipe: dict[str, Any]) -> dict[tuple[str, int | None], float]:
    found = {(row["metric"], row["at"][K]): row["value"] for row in recipe["published"]}
    assert len(found) == len(recipe["published"])
    return found


def zero_shot_rows() -> Iterator[tuple[str, str, dict[tuple[str, int | None], float]]]:
    for size, table in ZERO_SHOT.items():
        lines = table.replace("mctest:", "mctest_corrected_the_separator:").strip().splitlines()
        head, *rows = (line.partition(": ") for line in lines)
        ks = [None if k == "off" else int(k) for k in head[2].split()]
        for dataset, _, cells in rows:
            pairs = [tuple(map(float, cell.split("/"))) for cell in cells.split()]
            assert len(pairs) == len(ks)
            both = zip(ks, pairs, strict=True)
            yield (
                size,
                dataset,
                {(metric, k): pair[i] for k, pair in both for i, metric in enumerate(("exact_match", "f1"))},
            )


CELLS = {(size, dataset): values for size, dataset, values in zero_shot_rows()}


@pytest.mark.parametrize("size", ZERO_SHOT)
def test_transcribed_tables_have_the_published_means(size):
    columns = [values for (of, dataset), values in CELLS.items() if of == size and dataset != "mean"]
    for cell, mean in CELLS[size, "mean"].items():
        assert sum(values[cell] for values in columns) / len(columns) == pytest.approx(mean, abs=0.0051)


@pytest.mark.parametrize(("size", "dataset"), [key for key in CELLS if key[1] != "mean"])
def test_zero_shot_recipes_contain_the_published_table(size, dataset):
    recipe = read(f"unifiedqa-t5-{size}_{dataset}.yaml")
    expected = CELLS[size, dataset]
    assert scores(recipe) == expected
    assert recipe["over"][K] == list(dict.fromkeys(k for _, k in expected))
    assert recipe["model"] == f"allenai/unifiedqa-t5-{size}"
    assert recipe["train"] is None
    assert recipe["evaluate"] == {
        "tasks": [f"unifiedqa/{dataset}"],
        "split": "dev",
        "max_new_tokens": 19,
        "max_input_tokens": 512,
        "batch_size": 16,
    }
    assert {row["tolerance"] for row in recipe["published"]} == {1.0 if dataset in SMALL else 0.3}


@pytest.mark.parametrize("dataset", FINE_TUNED)
def test_fine_tuning_recipes_contain_the_published_table(dataset):
    untuned, (batch, accumulation), dense, kept = FINE_TUNED[dataset]
    tuned = read(f"t5-base-finetuned_{dataset}.yaml")
    assert scores(tuned) == {
        ("f1", None): dense[0],
        ("exact_match", None): dense[1],
        ("f1", 256): kept[0],
        ("exact_match", 256): kept[1],
    }
    own = tuned["train"].pop("per_device_train_batch_size"), tuned["train"].pop("gradient_accumulation_steps")
    # the memory of one device decides how the published batch is divided
    assert own[0] * own[1] == batch * accumulation
    assert tuned["train"] == {
        "tasks": [f"unifiedqa/{dataset}_t5"],
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "max_steps": 3001,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "group_by_length",
        "save_steps": 500,
        "save_total_limit": 1,
        "logging_steps": 100,
        "max_target_tokens": 100,
    }
    start = read(f"t5-base_{dataset}.yaml")
    assert scores(start) == {("exact_match", None): untuned}
    for recipe in (tuned, start):
        assert recipe["model"] == "google-t5/t5-base"
        assert recipe["evaluate"]["tasks"] == [f"unifiedqa/{dataset}_t5"]
        assert {row["tolerance"] for row in recipe["published"]} == {2.0}


def test_the_held_out_data_set_of_unifiedqa_has_a_recipe():
    assert scores(read("unifiedqa-t5-base_ropes.yaml")) == {("exact_match", None): UNIFIEDQA_ROPES}


def test_every_recipe_belongs_to_a_table():
    expected = {f"unifiedqa-t5-{size}_{dataset}.yaml" for size, dataset in CELLS if dataset != "mean"}
    expected |= {f"{model}_{dataset}.yaml" for model in ("t5-base", "t5-base-finetuned") for dataset in FINE_TUNED}
    assert set(NAMES) == expected | {"unifiedqa-t5-base_ropes.yaml"}


@pytest.mark.parametrize("name", NAMES)
def test_every_published_number_is_measured_by_its_recipe(name):
    recipe = read(name)
    assert recipe["method"]["name"] == "topk"
    for row in recipe["published"]:
        assert set(row) == {"task", "metric", "at", "value", "tolerance", "source"}
        assert row["task"] in recipe["evaluate"]["tasks"]
        assert row["metric"] in {metric.name for metric in get_task(row["task"]).metrics}
        assert row["at"][K] in recipe["over"][K]
        assert row["source"].startswith("Gupta et al. 2021, repository")


@pytest.mark.parametrize("name", NAMES)
def test_header_comments_contain_the_download_and_the_command(name):
    head = re.match(r"(#[^\n]*\n)+", (FOLDER / name).read_text(encoding="utf-8"))
    assert head
    recipe = read(name)
    assert f"hf download {recipe['model']}\n" in head[0]
    task = recipe["evaluate"]["tasks"][0].removeprefix("unifiedqa/").removesuffix("_t5")
    assert f"gs://unifiedqa/data/{task} " in head[0]
    assert f"graftwork run topk/{name.removesuffix('.yaml')} " in head[0]
