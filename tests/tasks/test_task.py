import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError, UnknownNameError
from graftwork.metrics.metric import Metric
from graftwork.tasks import MIXTURES, TASKS, Example, Examples, Mixture, Task, get_task
from graftwork.tasks.sources import Record, Records


def explained(text: str, example: Example) -> tuple[str, list[str]]:
    """Parser of a label followed by explanations."""
    label, *reasons = text.split(" explanation: ")
    return label, reasons


LABELS_RIGHT = Metric(
    "label_accuracy",
    lambda predictions, examples: (
        100
        * sum(label == row.metadata["label"] for (label, _), row in zip(predictions, examples.rows, strict=True))
        / examples.size
    ),
)
REASONS = Metric("reasons", lambda predictions, examples: float(sum(len(reasons) for _, reasons in predictions)))


def source(data: Path, split: str) -> Records:
    rows = tuple(Record(f"key{i}", {"text": f"Text {i}", "label": i % 3}) for i in range(20))
    return Records("toy", split, rows, size=25, ignored=5, path=data / "toy")


def word(record: Record) -> Example | None:
    label = record.fields["label"]
    if label == 2:
        return None
    name = ("no", "yes")[label]
    return Example(record.key, f"explain {record.fields['text']}", name, (name,), {"label": name})


TASK = Task(name="toy", source=source, format=word, parse=explained, metrics=(LABELS_RIGHT, REASONS))


def keys(examples: Examples) -> list[str]:
    return [row.key for row in examples.rows]


def test_all_rows_keep_the_order_of_the_file(tmp_path: Path):
    examples = TASK.load(tmp_path, "dev")
    assert keys(examples) == [f"key{i}" for i in range(20) if i % 3 != 2]
    assert (examples.task, examples.split, examples.ignored) == ("toy", "dev", 5)
    assert examples.size == 25 - 6, "rows that the task leaves out on purpose do not count as wrong"
    assert examples.source == str(tmp_path / "toy")


def test_subsets_are_nested_and_complementary(tmp_path: Path):
    whole = replace(TASK, format=lambda record: Example(record.key, "", ""))
    few, more = whole.load(tmp_path, "train", take=5), whole.load(tmp_path, "train", take=12)
    assert keys(more)[:5] == keys(few)
    assert more.size == 12
    rest = whole.load(tmp_path, "train", skip=12)
    assert sorted(keys(more) + keys(rest)) == sorted(keys(whole.load(tmp_path, "train")))
    assert keys(whole.load(tmp_path, "train", skip=5, take=7)) == keys(more)[5:]


def test_another_seed_or_split_draws_another_subset(tmp_path: Path):
    whole = replace(TASK, format=lambda record: Example(record.key, "", ""))
    first = keys(whole.load(tmp_path, "train", take=10))
    assert first == keys(whole.load(tmp_path, "train", take=10))
    assert first != keys(whole.load(tmp_path, "train", take=10, seed=1))
    assert first != keys(whole.load(tmp_path, "dev", take=10))


def test_a_task_can_declare_its_subset(tmp_path: Path):
    declared = replace(TASK, name="toy_take5", take=5, splits=("train",))
    assert declared.load(tmp_path, "train") == replace(TASK.load(tmp_path, "train", take=5), task="toy_take5")
    with pytest.raises(DataError, match="Found split 'dev' for toy_take5; expected one of: train"):
        declared.load(tmp_path, "dev")


def test_take_beyond_the_split_takes_all_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert len(TASK.load(tmp_path, "train", take=50).rows) == 14
        assert TASK.load(tmp_path, "train", skip=20).rows == ()
    assert [record.getMessage() for record in caplog.records] == [
        "toy: train has 20 rows, so take=50, skip=None leave fewer.",
        "toy: train has 20 rows, so take=None, skip=20 leave fewer.",
    ]


@pytest.mark.parametrize("name", ["take", "skip"])
@pytest.mark.parametrize("value", [0, -1])
def test_zero_take_is_refused(tmp_path: Path, name, value):
    with pytest.raises(ConfigError, match=f"Found {name} {value}; expected at least 1. Leave it out to use all rows"):
        TASK.load(tmp_path, "train", **{name: value})


def test_texts_are_lower_cased_before_formatting(tmp_path: Path):
    assert replace(TASK, lowercase=True).load(tmp_path, "dev").rows[0].input == "explain text 0"
    record = Record("K", {"list": ["A", "B"], "tuple": ("C",), "number": 3, "none": None})
    assert record.lowered() == Record("K", {"list": ["a", "b"], "tuple": ("c",), "number": 3, "none": None})


def test_metrics_receive_parsed_values(tmp_path: Path):
    examples = TASK.load(tmp_path, "dev")
    predictions = [f"{row.target} explanation: a explanation: b" for row in examples.rows]
    assert TASK.evaluate(predictions, examples) == {"label_accuracy": pytest.approx(100 * 14 / 19), "reasons": 28.0}


def test_an_undefined_score_stays_undefined(tmp_path: Path):
    task = replace(TASK, metrics=(Metric("bleu", lambda predictions, examples: math.nan),))
    examples = task.load(tmp_path, "dev")
    assert math.isnan(task.evaluate([""] * len(examples.rows), examples)["bleu"])


def test_predictions_and_examples_must_have_equal_length(tmp_path: Path):
    examples = TASK.load(tmp_path, "dev")
    with pytest.raises(DataError, match="Found 1 predictions for 14 examples of toy; expected one for each"):
        TASK.evaluate(["yes"], examples)
    with pytest.raises(ConfigError, match="Found no official metrics in task toy"):
        TASK.evaluate(["yes"] * 14, examples, official=True)


def test_first_scores_only_the_first_rows(tmp_path: Path):
    first = TASK.load(tmp_path, "dev").first(2)
    assert (keys(first), first.size, first.ignored) == (["key0", "key1"], 2, 0)
    assert TASK.evaluate(["no", "no"], first)["label_accuracy"] == 50.0
    with pytest.raises(ConfigError, match="Found count 0; expected at least 1"):
        first.first(0)


def test_a_source_without_rows_is_an_error(tmp_path: Path):
    empty = replace(TASK, source=lambda data, split: Records("toy", split, (), 3, 3, data))
    with pytest.raises(DataError, match=r"found no usable row for toy \(3 ignored\)"):
        empty.load(tmp_path, "dev")


def test_a_task_needs_a_name_and_distinct_metrics():
    with pytest.raises(ConfigError, match="Found the task name 'two words'"):
        replace(TASK, name="two words")
    with pytest.raises(ConfigError, match="expected different names"):
        replace(TASK, metrics=(REASONS, REASONS))


def test_a_mixture_holds_rates():
    mixture = Mixture("both", {"a": 100.0, "b": 0})
    assert mixture.training_tasks == ("a",)
    with pytest.raises(ConfigError, match="Found rate -1 for a in mixture bad; expected a number of at least 0"):
        Mixture("bad", {"a": -1})
    with pytest.raises(ConfigError, match="Found rate nan"):
        Mixture("bad", {"a": math.nan})
    with pytest.raises(ConfigError, match="Found no task in mixture none"):
        Mixture("none", {})


def test_tasks_are_found_by_name():
    assert get_task("unifiedqa/openbookqa_t5").name == "unifiedqa/openbookqa_t5"
    with pytest.raises(UnknownNameError, match=r"Did you mean 'unifiedqa/squad1_1'\?"):
        get_task("unifiedqa/squad11")
    assert all(TASKS.get(name).name == name for name in TASKS.names())
    assert all(task in TASKS for name in MIXTURES.names() for task in MIXTURES.get(name).rates)


def test_importing_the_tasks_loads_nothing_heavy():
    heavy = "torch transformers datasets rouge_score numpy"
    code = f"import sys, graftwork.tasks; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
