"""The tasks and mixtures of the paper: names, splits, rates; the cases R1 to R3, R5 and R7 of the specification."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, UnknownNameError
from graftwork.methods.wt5.tables import MIXTURES as OWN_MIXTURES
from graftwork.methods.wt5.tables import TASKS as OWN_TASKS
from graftwork.pipeline.evaluation import evaluated_tasks
from graftwork.tasks import MIXTURES, TASKS, get_task
from graftwork.tasks.sources import Record, Records
from graftwork.tasks.task import SIZE, metric_names

HERE = Path(__file__).parent
TASK_NAMES = (HERE / "frozen_tasks.txt").read_text().split()
MIXTURE_NAMES = (HERE / "frozen_mixtures.txt").read_text().split()
FAMILIES = {"cos_e": 16, "esnli": 23, "mnli": 3, "movie": 11, "imdb": 2, "amazon": 92, "eraser_multi_rc": 16}
"""Number of tasks per family in the tables of the specification."""


def test_r1_the_names_are_the_frozen_ones():
    assert sorted(OWN_TASKS) == TASK_NAMES
    assert sorted(OWN_MIXTURES) == MIXTURE_NAMES
    assert (len(TASK_NAMES), len(MIXTURE_NAMES)) == (163, 50)
    assert [name for name in TASKS if "/" not in name] == TASK_NAMES
    assert [name for name in MIXTURES if "/" not in name] == MIXTURE_NAMES


def test_r1_the_families_have_their_sizes():
    count = Counter(next(family for family in FAMILIES if name.startswith(family)) for name in TASK_NAMES)
    assert count == FAMILIES


@pytest.mark.parametrize("name", MIXTURE_NAMES)
def test_every_member_of_a_mixture_is_a_task_and_some_can_be_trained_on(name):
    mixture = MIXTURES.get(name)
    tasks = [get_task(member) for member in mixture.rates]
    assert any(task.exposes("train") for task in tasks if task.name in mixture.training_tasks)


@pytest.mark.parametrize("name", [name for name in TASK_NAMES if "take" in name or "skip" in name])
def test_subset_tasks_train_only_and_are_never_scored(name):
    for task in (get_task(name), get_task(name).in_mode("reference")):
        assert task.splits == ("train",)
        assert task.metrics == ()
        number = int(name.partition("take" if "take" in name else "skip")[2].partition("_")[0])
        assert (task.take, task.skip) == ((number, None) if "take" in name else (None, number))


def known_sizes(mixture):
    """Published sizes of the tasks that have a training split."""
    sizes = {"cos_e": 9741, "esnli": 549367, "movie": 1600, "amazon": 10**6, "imdb": 25000, "mnli": 392702}
    sizes["eraser"] = 24029
    tasks = [get_task(name) for name in mixture.rates]
    return {
        task.name: sizes[task.name.split("_")[0].replace("cos", "cos_e")] for task in tasks if task.exposes("train")
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("movie_rationales_1000_explanations", [0.625, 0.375]),
        ("cos_e_1000_explanations", [0.102659, 0.897341]),
        ("esnli_cos_e_transfer", [0.495606, 0.495606, 0.008788]),
        ("amazon_books_movies_equal", [0.5, 0.5]),
    ],
)
def test_r2_proportions_of_training(name, expected):
    mixture = MIXTURES.get(name)
    assert list(mixture.proportions(known_sizes(mixture)).values()) == pytest.approx(expected, abs=5e-7)


def test_rates_of_the_other_mixtures_are_those_of_the_specification():
    rates = MIXTURES.get("esnli_mnli_500_explanations").rates
    assert list(rates.values()) == [500, 548867, 549367, 392702, 9815, 9815]
    assert set(MIXTURES.get("amazon_reviews_movie_rationales").rates.values()) == {SIZE}
    assert len(MIXTURES.get("amazon_reviews_movie_rationales").rates) == 93
    movies = MIXTURES.get("amazon_reviews_movies_r20").rates
    assert (len(movies), movies["movie_rationales_v010"]) == (50, 2_500_000_000)
    halves = MIXTURES.get("amazon_reviews_movies_transfer_r20").rates
    assert halves["movie_rationales_v010"] == halves["movie_rationales_v010_no_expl"] == 1_250_000_000
    assert MIXTURES.get("eraser_multi_rc_rationales_2000_explanations").rates == {
        "eraser_multi_rc_explanations_take2000_v011": 2000,
        "eraser_multi_rc_labels_skip2000_v011": 22029,
        "eraser_multi_rc_eval_v011": 24029,
    }


def test_rates_by_size_count_the_available_examples():
    mixture = MIXTURES.get("imdb_reviews_movie_rationales")
    shares = mixture.proportions({"imdb_reviews_v100": 300, "movie_rationales_v010": 100})
    assert shares == {"imdb_reviews_v100": 0.75, "movie_rationales_v010": 0.25}


def test_a_mixture_without_any_training_example_is_an_error():
    with pytest.raises(ConfigError, match="Found no training example in mixture amazon_books_movies_equal"):
        MIXTURES.get("amazon_books_movies_equal").proportions({"movie_rationales_v010": 0})


def test_r3_a_mixture_evaluates_its_tasks_with_the_split_and_a_metric():
    assert evaluated_tasks("movie_rationales_200_explanations", "validation") == ["movie_rationales_eval_v010"]
    assert evaluated_tasks("movie_rationales_200_explanations", "dev") == ["movie_rationales_eval_v010"]
    assert evaluated_tasks("esnli_mnli_100_explanations", "validation") == [
        "esnli_eval_v010",
        "mnli_v002",
        "mnli_explain_eval_matched_v002",
        "mnli_explain_eval_mismatched_v002",
    ]
    with pytest.raises(ConfigError, match="no task with split 'train' and a metric"):
        evaluated_tasks("movie_rationales_200_explanations", "train")


KEYED = Records(
    "toy", "train", tuple(Record(f"k{i}", {"text": str(i), "label": 1}) for i in range(10)), 10, 0, Path("x")
)


def keys(records, **subset):
    task = replace(get_task("imdb_reviews_v100"), source=lambda data, split: records)
    return {row.key for row in task.load(Path("x"), "train", **subset).rows}


def test_r5_subsets_of_ten_keyed_records():
    taken, rest = keys(KEYED, take=4), keys(KEYED, skip=4)
    assert taken | rest == {record.key for record in KEYED.rows}
    assert not taken & rest
    assert keys(KEYED, take=2) < taken
    shuffled = replace(KEYED, rows=KEYED.rows[::-1])
    assert keys(shuffled, take=4) == taken


def test_r7_an_unknown_name_suggests_the_nearest_one():
    with pytest.raises(UnknownNameError, match="Did you mean 'movie_rationales_1000_explanations'"):
        MIXTURES.get("movie_rationales_take1000_explanations")


def test_multirc_reports_the_f1_of_the_paper_beside_accuracy():
    names = metric_names(get_task("eraser_multi_rc_eval_v011").metrics)
    assert {"accuracy", "f1a", "token_f1"} <= set(names)
    assert metric_names(get_task("eraser_multi_rc_eval_v011").in_mode("reference").metrics) == [
        "accuracy",
        "f1",
        "partial match f1",
        "avg_explanation_count",
    ]


def test_mnli_has_a_validation_split_in_fixed_mode_only():
    assert get_task("mnli_v002").exposes("validation")
    assert not get_task("mnli_v002").in_mode("reference").exposes("validation")
