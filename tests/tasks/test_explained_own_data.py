"""Own explained data: quotes, offsets and token masks, held-out rows, explained and plain examples."""

import json
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.inputs import read_inputs
from graftwork.tasks.loading import load_tasks, load_training, load_validation
from graftwork.tasks.own_data.explained_task import definition_of, explained_task
from graftwork.tasks.own_data.task_file import TaskFile, read_task_file

FIELDS = {"text_field": "text", "label_field": "label", "spans_field": "why"}
TEXT = "Stay home. A lazy sequel."


@pytest.fixture
def write_rows(tmp_path):
    def make(rows, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def read_one(write_rows, why, text=TEXT, **fields):
    rows = [{"text": text, "label": "bad", "why": why}, {"text": "fine", "label": "good", "why": None}]
    task, split = explained_task(definition_of(write_rows(rows), DataFields(**{**FIELDS, **fields})), "dev")
    return task.load(Path(), split).rows[0]


@pytest.mark.parametrize(
    ("why", "spans"),
    [
        ("lazy sequel", ((13, 24),)),
        (["lazy", "Stay home"], ((0, 9), (13, 17))),
        ('["lazy", "sequel"]', ((13, 17), (18, 24))),
        ([[13, 24]], ((13, 24),)),
        ([{"start": 0, "end": 4}, {"start": 13, "end": 17}], ((0, 4), (13, 17))),
        ([0, 0, 0, 1, 1], ((13, 25),)),
        ([[0, 0, 0, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 1, 0]], ((13, 17),)),
        ("[[0,0,0,1,1],[1,0,0,1,1]]", ((0, 4), (13, 25))),
        ("nan", ()),
        (None, ()),
        ([], ()),
    ],
)
def test_spans_are_read_from_every_notation(write_rows, why, spans):
    row = read_one(write_rows, why)
    assert row.metadata["spans"] == spans
    reasons = [TEXT[start:end] for start, end in spans]
    assert row.target == " explanation: ".join(["bad", *reasons])
    assert row.input == f"explain classify text: {TEXT}"
    start = row.metadata["source_start"]
    assert row.input[start:] == row.metadata["source"] == TEXT


def test_a_text_of_tokens_is_joined_and_marked(write_rows):
    row = read_one(write_rows, [[0, 1, 1], [0, 1, 0]], text=["a", "lazy", "sequel"])
    assert (row.metadata["source"], row.metadata["spans"]) == ("a lazy sequel", ((2, 13),))


def test_a_quote_that_is_not_in_the_text_is_counted_and_left_out(write_rows, capsys):
    row = read_one(write_rows, ["lazy", "nowhere"])
    assert (row.target, row.metadata["gold_unmatched"]) == ("bad explanation: lazy", 1)
    assert "1 quotes are not in their text and left out" in capsys.readouterr().err


@pytest.mark.parametrize("why", [[[3, 99]], [[5, 5]], [[0, 1, 1]], [{"start": 1}], [3, 4]])
def test_offsets_outside_the_text_and_masks_of_another_length_are_one_line(write_rows, why):
    with pytest.raises(
        DataError, match=r"line 1: found .* in field 'why'; expected a quote of the text, \[start, end\]"
    ):
        read_one(write_rows, why)


def test_free_text_explanations_of_several_columns(write_rows):
    rows = [
        {"text": "t", "label": "a", "r1": "it is so very well made", "r2": "nan"},
        {"text": "u", "label": "b", "r1": "", "r2": None},
    ]
    fields = DataFields(text_field="text", label_field="label", explanation_field=("r1", "r2"))
    task, split = explained_task(definition_of(write_rows(rows), fields), "dev")
    (first, second) = task.load(Path(), split).rows
    assert (first.target, second.target) == ("a explanation: it is so very well made", "b")
    assert "source" not in first.metadata
    scores = task.evaluate([first.target, second.target], task.load(Path(), split))
    assert (scores["accuracy"], scores["bleu"]) == (100, pytest.approx(100))


def many(write_rows, count=40):
    return write_rows(
        [
            {
                "id": f"r{n}",
                "text": f"a lazy film {n}",
                "label": ("bad", "good")[n % 2],
                "why": "lazy" if n < 30 else None,
            }
            for n in range(count)
        ]
    )


def test_held_out_rows_are_those_of_the_evaluation_and_no_others(write_rows):
    name = many(write_rows)
    settings = TrainingSettings(tasks=(name,), validation=0.25, **FIELDS)
    trained = load_training(settings, None, 7).examples[0].rows
    held = load_validation(settings, None, 7)[0].rows
    assert (len(trained), len(held)) == (30, 10)
    assert {row.key for row in trained} | {row.key for row in held} == {f"r{n}" for n in range(40)}
    # rows without an explanation are trained with their label alone, and all are asked for one in evaluation
    for row in trained:
        explained = int(row.key[1:]) < 30
        assert row.input.startswith("explain ") == explained
        assert ("explanation:" in row.target) == explained
    assert all(row.input.startswith("explain ") for row in held)
    ((_, examples),) = load_tasks(
        [name], None, "dev", 7, fields=TrainingSettings(tasks=(name,), validation=0.25, subset_seed=7, **FIELDS)
    )
    assert [row.key for row in examples.rows] == [row.key for row in held]


def test_a_number_of_explanations_is_kept_and_smaller_numbers_are_nested(write_rows):
    name = many(write_rows)

    def explained(count):
        settings = TrainingSettings(tasks=(name,), explanations=count, **FIELDS)
        rows = load_training(settings, None, 0).examples[0].rows
        assert len(rows) == 40
        return {row.key for row in rows if row.input.startswith("explain ")}

    few, more = explained(5), explained(12)
    assert (len(few), len(more)) == (5, 12)
    assert few < more
    assert len(explained(None)) == 30


def test_a_task_file_is_a_task(write_rows, tmp_path):
    name = many(write_rows)
    own, _ = explained_task(definition_of(name, TrainingSettings(tasks=(name,), validation=0.25, **FIELDS)), "train")
    definition = own.source.definition
    assert definition.labels == ("bad", "good")
    path = tmp_path / "mine.task.yaml"
    definition.write(path)
    assert read_task_file(str(path)) == definition
    ((task, examples),) = load_tasks([str(path)], None, "dev", 0)
    assert (task.name, len(examples.rows)) == ("mine", 10)
    assert task.lengths.input == 2048
    assert 32 <= task.lengths.target <= 512
    with pytest.raises(ConfigError, match="Found no task file"):
        read_task_file("nowhere.task.yaml")
    with pytest.raises(ConfigError, match="without name, source or text_field"):
        TaskFile(name="x")


def test_inputs_of_a_prediction_need_no_label(write_rows):
    name = write_rows([{"text": "a lazy film"}], "new.jsonl")
    settings = EvaluationSettings(text_field="text", label_field="label", spans_field="why", labels=("bad", "good"))
    (row,) = read_inputs(Path(name), settings)
    assert row.input == "explain classify text: a lazy film"
    assert (row.metadata["choices"], row.target) == (("bad", "good"), "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_field": "t", "label_field": "l"}, "without explanation_field or spans_field"),
        ({"text_field": "t", "spans_field": "s"}, "without label_field"),
        ({"spans_field": "s", "input_field": "t", "label_field": "l"}, "Found spans_field without text_field"),
        ({**FIELDS, "explanation_field": "e"}, "exclude each other"),
        ({**FIELDS, "input_field": "i"}, "exclude each other"),
    ],
)
def test_incomplete_and_contradictory_columns_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataFields(**fields)


def test_explanations_without_explained_data_are_refused():
    with pytest.raises(ConfigError, match="explanations is 5, which has an effect on own explained data only"):
        TrainingSettings(tasks=("x",), explanations=5)


def test_an_unknown_label_and_a_single_label_are_one_line(write_rows):
    name = write_rows([{"text": "t", "label": "odd", "why": ""}])
    with pytest.raises(DataError, match="found the labels odd; expected at least 2"):
        explained_task(definition_of(name, DataFields(**FIELDS)), "dev")
    with pytest.raises(DataError, match=r"line 1: found the label 'odd' in 'label'; expected one of: bad, good"):
        explained_task(definition_of(name, DataFields(**FIELDS, labels=("bad", "good"))), "dev")
