import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.tasks import TASKS, get_task, unifiedqa_task
from graftwork.tasks.sources import Record, write_json_lines
from graftwork.tasks.unifiedqa import DATASETS, DEFAULT_DATASETS, format_t5, format_unifiedqa, read_options

Write = Callable[[str, bytes | str], Path]


def record(text: str, **fields: object) -> Record:
    return Record("0", {"input": text, "ans": "x", "all_answers": ("x",), **fields})


def test_every_data_set_is_a_task_in_both_formats():
    assert len(DEFAULT_DATASETS) == 12
    assert set(DATASETS) - set(DEFAULT_DATASETS) == {"ropes"}
    names = {name for name in TASKS.names() if name.startswith("unifiedqa/")}
    assert names == {f"unifiedqa/{name}{end}" for name in DATASETS for end in ("", "_t5")}


def test_t5_format_keeps_the_spaces_around_the_separator():
    expected = "question: Q  context: <yes> <no> <No Answer>  (A) x (B) y"
    assert format_t5(record(r"Q \n (A) x (B) y")).input == expected
    assert format_t5(record(r"Q \n (A) x \n passage")).input.endswith(r"  (A) x \n passage")


def test_t5_format_without_separator_ends_without_a_space():
    assert format_t5(record("Q")).input == "question: Q context: <yes> <no> <No Answer>"


def test_unifiedqa_format_keeps_the_input():
    text = r"  What?\n(A) x  \n  passage "
    assert format_unifiedqa(record(text)).input == text


def test_only_the_target_is_stripped():
    example = format_unifiedqa(Record("3", {"input": "q", "ans": " x ", "all_answers": (" x ", "y")}))
    assert (example.key, example.target, example.answers) == ("3", "x", (" x ", "y"))


def test_dev_falls_back_to_test_with_the_answers_of_test(write: Write, tmp_path: Path):
    write("narrativeqa/test.tsv", "Q \\n s\tx\n")
    write("narrativeqa/dev_ans.jsonl", '["answer of dev"]\n')
    examples = get_task("unifiedqa/narrativeqa").load(tmp_path, "dev")
    assert examples.split == "test"
    assert [row.answers for row in examples.rows] == [("x",)]
    write("narrativeqa/test_ans.jsonl", '["x", "answer of test"]\n')
    assert get_task("unifiedqa/narrativeqa").load(tmp_path, "dev").rows[0].answers == ("x", "answer of test")
    with pytest.raises(DataError, match=r"Found no train data of narrativeqa .*\(test\.tsv\)"):
        get_task("unifiedqa/narrativeqa").load(tmp_path, "train")


def test_rows_are_physical_lines_with_their_own_answers(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lines = [
        '"quoted" \\n a\tone',
        'an "unbalanced \\n b\ttwo',
        "three\tcolumns\there",
        "",
        "Q\tno separator",
        "last \\n c\tthree",
    ]
    write("boolq/dev.tsv", "\n".join(lines) + "\n")
    write("boolq/dev_ans.jsonl", "".join(json.dumps([f"answer {i}"]) + "\n" for i in range(6)))
    with caplog.at_level(logging.INFO):
        examples = get_task("unifiedqa/boolq_t5").load(tmp_path, "dev")
    assert [row.metadata["id"] for row in examples.rows] == [0, 1, 4, 5]
    assert [row.answers for row in examples.rows] == [("answer 0",), ("answer 1",), ("answer 4",), ("answer 5",)]
    assert [row.target for row in examples.rows] == ["one", "two", "no separator", "three"]
    assert examples.rows[0].input == 'question: "quoted"  context: <yes> <no> <No Answer>  a'
    assert examples.rows[2].input == "question: Q context: <yes> <no> <No Answer>"
    assert (examples.size, examples.ignored) == (6, 2)
    assert caplog.messages == [f"{tmp_path}/boolq/dev.tsv: kept 4 rows, ignored 2, without separator 1"]


def test_ignored_rows_count_as_wrong(write: Write, tmp_path: Path):
    write("boolq/dev.tsv", "a\tyes\nbroken\nb\tno\n")
    task = get_task("unifiedqa/boolq")
    examples = task.load(tmp_path, "dev")
    assert task.evaluate(["yes", "no"], examples) == {
        "exact_match": pytest.approx(200 / 3),
        "f1": pytest.approx(200 / 3),
    }
    assert task.evaluate(["yes", "no"], examples.first(2)) == {"exact_match": 100.0, "f1": 100.0}


def test_answer_files_of_different_length_are_refused(write: Write, tmp_path: Path):
    write("boolq/dev.tsv", "a\tyes\nb\tno\n")
    write("boolq/dev_ans.jsonl", '["yes"]\n')
    with pytest.raises(DataError, match=r"found 1 lines of answers for 2 lines of dev\.tsv; expected as many"):
        get_task("unifiedqa/boolq").load(tmp_path, "dev")


@pytest.mark.parametrize("line", ["[]", '"yes"', "[1]"])
def test_malformed_answer_files_are_refused(write: Write, tmp_path: Path, line):
    write("boolq/dev.tsv", "a\tyes\n")
    write("boolq/dev_ans.jsonl", line + "\n")
    with pytest.raises(DataError, match=r"dev_ans\.jsonl, line 1: .*expected a list of at least one text"):
        get_task("unifiedqa/boolq").load(tmp_path, "dev")


def test_letters_come_from_a_matching_meta_file(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write("arc_easy/dev.tsv", "q \\n (A) x (B) y\tx\nq \\n (A) x (B) y\ty\n")
    meta = write("arc_easy/dev_meta.txt", "id1\tA\nid2\t2\n")
    task = get_task("unifiedqa/arc_easy")
    assert [row.metadata["answer_key"] for row in task.load(tmp_path, "dev").rows] == ["A", "2"]
    assert task.evaluate(["x", "y"], task.load(tmp_path, "dev"), official=True) == {"multiple_choice_accuracy": 100.0}
    meta.write_text("id1\tA\n")
    examples = task.load(tmp_path, "dev")
    assert "answer_key" not in examples.rows[0].metadata
    assert "is not used: it has 1 lines for 2 rows" in caplog.text
    assert task.evaluate(["x", "y"], examples, official=True) == {"multiple_choice_accuracy": 100.0}


def test_the_data_folder_may_be_the_folder_of_the_data_set(write: Write, tmp_path: Path):
    write("openbookqa/dev.tsv", "q\tx\n")
    task = get_task("unifiedqa/openbookqa")
    assert task.load(tmp_path / "openbookqa", "dev") == task.load(tmp_path, "dev")
    with pytest.raises(DataError, match="no such folder"):
        get_task("unifiedqa/arc_easy").load(tmp_path / "openbookqa", "dev")


def test_any_folder_of_the_collection_can_become_a_task(write: Write, tmp_path: Path):
    write("qasc/dev.tsv", "Q \\n (A) X (B) Y\tX\n")
    task = unifiedqa_task("qasc", format="t5", lowercase=True)
    example = task.load(tmp_path, "dev").rows[0]
    assert task.name == "unifiedqa/qasc_t5"
    assert example.input == "question: q  context: <yes> <no> <No Answer>  (a) x (b) y"
    assert (example.target, example.answers) == ("x", ("x",))
    with pytest.raises(ConfigError, match="Found format 'gpt'; expected one of: unifiedqa, t5"):
        unifiedqa_task("qasc", format="gpt")  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["", "boolq/"])
def test_prepared_files_are_a_fallback(tmp_path: Path, place):
    row = {"split": "test", "id": 3, "input": "Worded <yes> <no> <No Answer>", "ans": "Yes", "split_size": 5}
    rows = [{"dataset": "other", **row}, {"dataset": "boolq", **row, "all_answers": ["Yes", "y"]}]
    write_json_lines(tmp_path / f"{place}combined_dev_t5.jsonl", rows)
    examples = get_task("unifiedqa/boolq_t5").load(tmp_path, "dev")
    assert [row.input for row in examples.rows] == ["Worded <yes> <no> <No Answer>"]
    assert (examples.split, examples.size, examples.rows[0].answers) == ("test", 5, ("Yes", "y"))
    lowered = unifiedqa_task("boolq", format="t5", lowercase=True).load(tmp_path, "dev").rows[0]
    assert (lowered.input, lowered.target) == ("worded <yes> <no> <No Answer>", "yes")
    with pytest.raises(DataError, match=r"expected one of: .*boolq.*dev\.tsv, .*combined_dev_unifiedqa\.jsonl"):
        get_task("unifiedqa/boolq").load(tmp_path, "dev")


def test_a_prepared_file_without_the_data_set_is_refused(tmp_path: Path):
    write_json_lines(tmp_path / "combined_dev_unifiedqa.jsonl", [{"dataset": "other", "input": "a", "ans": "b"}])
    with pytest.raises(DataError, match=r"combined_dev_unifiedqa\.jsonl: found no row of boolq"):
        get_task("unifiedqa/boolq").load(tmp_path, "dev")


@pytest.mark.parametrize("format", [format_unifiedqa, format_t5])
def test_options_are_parsed_from_both_formats(format):
    example = format(record(r"Which (a) one? \n (A) Big cat (B) (C) dog \n a passage with (D) in it", dataset="race"))
    assert read_options(example) == ("big cat", "", "dog")
    letters = " ".join(f"({letter}) {letter * 2}" for letter in "ABCDEFGH")
    assert len(read_options(format(record(rf"Q \n {letters}", dataset="race")))) == 5
    assert len(read_options(format(record(rf"Q \n {letters}", dataset="qasc")))) == 8
