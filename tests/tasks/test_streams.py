"""Large files: streamed into tables, with the rows, order and scores of small ones."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from graftwork.core import stored_rows
from graftwork.core.stored_rows import StoredRows
from graftwork.errors import DataError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings
from graftwork.tasks import streams
from graftwork.tasks.inputs import read_inputs
from graftwork.tasks.loading import load_tasks, load_training
from graftwork.tasks.own_data import task as own_data
from graftwork.tasks.sources import Record
from graftwork.training.validation import hold_out


def rows_of(kind, count=30):
    for number in range(count):
        if kind == "prepared":
            dataset = "first" if number % 3 else "second"
            yield {"dataset": dataset, "split": "train", "id": f"r{number}", "input": f"What Is {number}?", "ans": "It"}
        elif kind == "plain":
            yield {"input": f"What Is {number}?", "target": f"It {number % 4}"}
        elif kind == "chat":
            turns = [{"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": "There"}]
            yield {"messages": turns}
        else:
            yield {"text": f"Text {number}", "label": ("good", "bad", "odd")[number % 3]}


@pytest.fixture
def small_limits(monkeypatch, tmp_path):
    """Make every file large and every sequence of rows a table."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))

    def set_limits():
        own_data._describe.cache_clear()
        monkeypatch.setattr(streams, "LARGE", 1)
        monkeypatch.setattr(stored_rows, "IN_MEMORY", 3)

    yield set_limits
    own_data._describe.cache_clear()


def written(path, kind, count=30):
    text = "".join(json.dumps(row) + "\n" for row in rows_of(kind, count))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def loaded(name, **options):
    return [
        (task.labels, replace(part, rows=tuple(part.rows)))
        for task, part in load_tasks([name], None, "x", 3, **options)
    ]


@pytest.mark.parametrize("kind", ["prepared", "plain", "chat", "classes"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_streamed_file_has_the_rows_of_one_in_memory(tmp_path, small_limits, kind, suffix):
    name = written(tmp_path / f"rows{suffix}", kind)
    options = [{}, {"take": 4}, {"take": 50}, {"lowercase": True}]
    expected = [loaded(name, **option) for option in options]
    small_limits()
    for option, result in zip(options, expected, strict=True):
        assert loaded(name, **option) == result
        # once more, from the cache
        assert loaded(name, **option) == result
    assert all(isinstance(part.rows, StoredRows) for _, part in load_tasks([name], None, "x", 3))


@pytest.mark.parametrize("kind", ["prepared", "plain", "chat"])
def test_inputs_of_a_streamed_file_are_those_of_one_in_memory(tmp_path, small_limits, kind):
    name = tmp_path / "rows.jsonl"
    written(name, kind)
    (tmp_path / "lines.txt").write_text("".join(f"Line {number}\n\n" for number in range(20)))
    options = [EvaluationSettings(), EvaluationSettings(lowercase=True), EvaluationSettings(explain=True)]
    expected = [[tuple(read_inputs(path, o)) for o in options] for path in (name, tmp_path / "lines.txt")]
    small_limits()
    found = [[tuple(read_inputs(path, o)) for o in options] for path in (name, tmp_path / "lines.txt")]
    assert found == expected


def test_training_and_held_out_rows_are_those_of_a_file_in_memory(tmp_path, small_limits):
    settings = TrainingSettings(tasks=(written(tmp_path / "rows.jsonl", "plain"),), take=20)
    expected = hold_out(load_training(settings, None, 1).examples, 0.3, 5)
    small_limits()
    found = hold_out(load_training(settings, None, 1).examples, 0.3, 5)
    for ours, theirs in zip(found, expected, strict=True):
        assert [tuple(part.rows) for part in ours] == [tuple(part.rows) for part in theirs]
        assert [part.size for part in ours] == [part.size for part in theirs]
        assert all(isinstance(part.rows, StoredRows) for part in ours)


def test_a_changed_file_is_read_again(tmp_path, small_limits):
    small_limits()
    path = tmp_path / "rows.jsonl"
    written(path, "plain")
    assert len(loaded(str(path))[0][1].rows) == 30
    written(path, "plain", count=29)
    assert len(loaded(str(path))[0][1].rows) == 29
    path.write_text(path.read_text() + '{"input": 3}\n')
    with pytest.raises(DataError, match="line 30"):
        loaded(str(path))


def test_dropped_records_keep_the_choice_of_subsets(tmp_path, small_limits):
    small_limits()
    records = [Record(str(number), {"number": number}) for number in range(12)]
    stream = streams.RecordStream(lambda: iter(records), 12, None)
    assert stream[3] == records[3]
    assert list(stream[2:8:3]) == records[2:8:3]
    from graftwork.core.example import Example
    from graftwork.tasks.sources import Records
    from graftwork.tasks.task import Task

    def format(record):
        number = record.fields["number"]
        return None if number % 4 == 1 else Example(record.key, str(number), "")

    def source(rows):
        return lambda data, split: Records("made", split, rows, 12, 0, tmp_path)

    for options in ({}, {"take": 5}, {"skip": 4}, {"take": 3, "skip": 6}):
        streamed = Task(name="made", source=source(stream), format=format).load(tmp_path, "train", **options)
        in_memory = Task(name="made", source=source(tuple(records)), format=format).load(tmp_path, "train", **options)
        assert tuple(streamed.rows) == in_memory.rows
        assert streamed.size == in_memory.size


def test_only_functions_with_a_fixed_name_have_a_cache_key():
    assert streams.derived_key("k", own_data.format_own) is not None
    assert streams.derived_key("k", own_data.format_own, 1) != streams.derived_key("k", own_data.format_own, 2)
    assert streams.derived_key("k", lambda record: None) is None
    assert streams.derived_key(None, own_data.format_own) is None
