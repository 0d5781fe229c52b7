"""Answers in a file: appended, resumed after a kill, read back by position, and verified."""

from __future__ import annotations

import json

import pytest

from graftwork.core.example import Example
from graftwork.core.files import drop_torn_line, read_lines
from graftwork.errors import ConfigError, DataError
from graftwork.evaluation.answer_file import AnswerFile, part_file

ROWS = [Example(f"k{number}", f"input {number} \u2028 é", "", (f"a{number}",)) for number in range(6)]
KEY = {"weights": "w1"}


def written(path, indices=(4, 1, 0)):
    file = AnswerFile(path, len(ROWS), KEY)
    for index in indices:
        file.begin()
        file.append(index, ROWS[index], {"prediction": f"é {index}", "more": [index]})
    return file


def test_answers_are_read_in_the_order_of_the_rows(tmp_path):
    answers = written(tmp_path / "out.jsonl", (4, 1, 0, 5, 2, 3)).answers()
    expected = [{"prediction": f"é {index}", "more": [index]} for index in range(6)]
    assert list(answers) == expected
    assert [answers[index] for index in (5, -1, 0)] == [expected[index] for index in (5, -1, 0)]
    assert list(answers[1:5:2]) == expected[1:5:2]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert lines[0]["input"] == ROWS[4].text
    assert lines[0]["answers"] == ["a4"]


def test_answers_of_a_stopped_call_are_reused(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path)
    with path.open("a") as file:
        file.write('{"row": 2, "predic')
    again = AnswerFile(path, len(ROWS), KEY)
    assert len(again) == 3
    assert [index for index in range(6) if index in again] == [0, 1, 4]
    again.begin()
    again.append(2, ROWS[2], {"prediction": "b"})
    assert [row["row"] for row in read_lines(path)] == [4, 1, 0, 2]


def test_answers_with_another_key_are_discarded_once_there_is_a_new_one(tmp_path):
    path = tmp_path / "out.jsonl"
    written(path)
    other = AnswerFile(path, len(ROWS), {"weights": "w2"})
    assert len(other) == 0
    assert path.read_text().count("\n") == 3
    other.begin()
    other.append(3, ROWS[3], {"prediction": "c"})
    assert [row["row"] for row in read_lines(path)] == [3]
    assert len(AnswerFile(path, len(ROWS), KEY)) == 0


def test_a_file_of_someone_else_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(ConfigError, match="not written by Graftwork"):
        AnswerFile(path, 3, KEY)
    assert path.read_text() == "mine\n"


def test_a_changed_answer_is_refused_when_it_is_read(tmp_path):
    path = tmp_path / "out.jsonl"
    answers = written(path).answers()
    path.write_bytes(path.read_bytes().replace("é 1".encode(), "è 1".encode()))
    assert answers[4]["prediction"] == "é 4"
    with pytest.raises(DataError, match="SHA-256"):
        answers[1]
    with pytest.raises(DataError, match="line 2"):
        AnswerFile(path, len(ROWS), KEY)


@pytest.mark.parametrize("size", [10, 70_000, 200_000])
def test_a_torn_line_of_any_length_is_dropped(tmp_path, size):
    path = tmp_path / "lines.jsonl"
    whole = "".join(json.dumps({"n": "x" * size}) + "\n" for _ in range(3))
    for torn in ("", '{"n": "' + "y" * size, "{"):
        path.write_text(whole + torn)
        drop_torn_line(path)
        assert path.read_text() == whole
    path.write_text('{"n": "' + "y" * size)
    drop_torn_line(path)
    assert path.read_text() == ""


def test_answers_of_other_processes_are_moved_into_the_file(tmp_path):
    path = tmp_path / "out.jsonl"
    one = written(tmp_path / "one.jsonl", (4, 1, 0, 5, 2, 3))
    main = written(path, (4,))
    for process, indices in ((0, (1, 4)), (1, (0, 5, 2)), (7, (3,))):
        written(part_file(path, process), indices)
    main.absorb()
    assert list(main.answers()) == list(one.answers())
    assert sorted(path.read_bytes().split(b"\n")) == sorted(one.path.read_bytes().split(b"\n"))
    assert {file.name for file in tmp_path.iterdir() if "process" in file.name} == set()


def test_answers_of_processes_with_another_key_are_discarded(tmp_path):
    path = tmp_path / "out.jsonl"
    main = written(path, (4,))
    stale = AnswerFile(part_file(path, 1), len(ROWS), {"weights": "w0"})
    stale.begin()
    stale.append(2, ROWS[2], {"prediction": "old"})
    main.absorb()
    assert 2 not in main
    assert len(list(tmp_path.iterdir())) == 2
