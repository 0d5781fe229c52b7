import json
import logging
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.tasks import get_task
from graftwork.tasks.prepare import load_prepared, prepare, task_from_file


class Spaces:
    """Minimal tokenizer for counting tokens."""

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        extra = [1] if add_special_tokens else []
        return {"input_ids": [[0] * len(text.split()) + extra for text in texts]}


@pytest.fixture
def raw(write, tmp_path: Path) -> Path:
    write("raw/arc_easy/dev.tsv", "Q one \\n (A) x (B) y\t x\nbroken\nQ\ty\n")
    write("raw/arc_easy/dev_ans.jsonl", '["x"]\n["?"]\n["y", "Y"]\n')
    write("raw/narrativeqa/test.tsv", "Who? \\n A Story\tA Man\n")
    write("raw/squad2/train.tsv", "Why? \\n Text\tBecause\n")
    return tmp_path / "raw"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_has_the_published_fields(raw: Path, tmp_path: Path):
    done = prepare(["unifiedqa/arc_easy"], input=raw, output=tmp_path / "out", format="t5", tokenizer=Spaces())  # type: ignore[arg-type]
    assert done.path == tmp_path / "out" / "combined_dev_t5.jsonl"
    assert lines(done.path) == [
        {
            "dataset": "arc_easy",
            "split": "dev",
            "id": 0,
            "input": "question: Q one  context: <yes> <no> <No Answer>  (A) x (B) y",
            "ans": " x",
            "all_answers": ["x"],
            "num_t5_toks": 12,
            "split_size": 3,
        },
        {
            "dataset": "arc_easy",
            "split": "dev",
            "id": 2,
            "input": "question: Q context: <yes> <no> <No Answer>",
            "ans": "y",
            "all_answers": ["y", "Y"],
            "num_t5_toks": 7,
            "split_size": 3,
        },
    ]
    assert done.weighted_path is None
    assert list(tmp_path.glob("out/*.jsonl")) == [done.path]


def test_the_log_has_counts_per_data_set(raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        done = prepare(["arc_easy"], input=raw, output=tmp_path, tokenizer=Spaces())  # type: ignore[arg-type]
    summary = done.summaries[0]
    assert (summary.kept, summary.ignored, summary.without_separator) == (2, 1, 1)
    assert summary.tokens_98 == pytest.approx(1 + 0.98 * 6)
    assert caplog.messages == [
        "arc_easy: split dev, kept 2, ignored 1, without separator 1, 98th percentile 7 tokens",
    ]


def test_all_selects_every_folder_with_the_split(raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO):
        done = prepare(["all"], input=raw, output=tmp_path, progress=lambda *step: seen.append(step))
    assert [(row["dataset"], row["split"]) for row in lines(done.path)] == [
        ("arc_easy", "dev"),
        ("arc_easy", "dev"),
        ("narrativeqa", "test"),
    ]
    assert done.path.name == "combined_dev_unifiedqa.jsonl"
    assert all(row["num_t5_toks"] is None for row in lines(done.path))
    assert "squad2 is skipped: it has no dev.tsv" in caplog.text
    assert seen == [("arc_easy", 2, 2), ("narrativeqa", 1, 1)]


def test_special_words_are_not_lower_cased(raw: Path, tmp_path: Path):
    done = prepare(["narrativeqa"], input=raw, output=tmp_path, format="t5", lowercase=True)
    row = lines(done.path)[0]
    assert row["input"] == "question: who?  context: <yes> <no> <No Answer>  a story"
    assert (row["ans"], row["all_answers"]) == ("a man", ["a man"])


def test_the_weighted_file_repeats_small_data_sets(raw: Path, tmp_path: Path):
    done = prepare(["arc_easy", "narrativeqa"], input=raw, output=tmp_path, weighted_to=5)
    assert done.weighted_path == tmp_path / "weighted_dev_unifiedqa.jsonl"
    assert done.weighted_path is not None
    assert [row["dataset"] for row in lines(done.weighted_path)] == ["arc_easy"] * 4 + ["narrativeqa"] * 5
    large = prepare(["arc_easy"], input=raw, output=tmp_path / "large", weighted_to=1)
    assert large.weighted_path is not None
    assert len(lines(large.weighted_path)) == 2


def test_missing_data_sets_are_reported_before_writing(raw: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"Found no boolq/dev\.tsv, squad2/dev\.tsv in .*; expected a folder for each"):
        prepare(["arc_easy", "boolq", "squad2"], input=raw, output=tmp_path / "out")
    with pytest.raises(DataError, match=r"Found no commonsenseqa/dev\.tsv, squad1_1/dev\.tsv"):
        prepare([], input=raw, output=tmp_path / "out")
    with pytest.raises(DataError, match=r"Found no folder with dev\.tsv"):
        prepare(["all"], input=tmp_path / "nowhere", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "gpt"}, "Found format 'gpt'; expected one of: unifiedqa, t5"),
        ({"workers": -1}, "Found workers -1; expected at least 1. Leave it out to switch it off"),
        ({"weighted_to": 0}, "Found weighted_to 0"),
        ({"tokenizer": "/no/such/folder"}, "Found no tokenizer '/no/such/folder'"),
    ],
)
def test_invalid_settings_are_refused(raw: Path, tmp_path: Path, settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(["arc_easy"], input=raw, output=tmp_path, **settings)


def test_prepared_and_raw_files_yield_equal_examples(raw: Path, tmp_path: Path):
    for format, name in (("unifiedqa", "unifiedqa/arc_easy"), ("t5", "unifiedqa/arc_easy_t5")):
        prepare(["arc_easy"], input=raw, output=tmp_path / "out", format=format)  # type: ignore[arg-type]
        task = get_task(name)
        direct, prepared = task.load(raw, "dev"), task.load(tmp_path / "out", "dev")
        assert (prepared.size, prepared.split, prepared.task) == (direct.size, direct.split, direct.task)
        texts = [(row.key, row.input, row.target, row.answers) for row in direct.rows]
        assert [(row.key, row.input, row.target, row.answers) for row in prepared.rows] == texts


def test_a_file_becomes_one_task_per_data_set(raw: Path, tmp_path: Path):
    done = prepare(["all"], input=raw, output=tmp_path, format="t5")
    pairs = task_from_file(done.path)
    assert [(task.name, examples.split) for task, examples in pairs] == [
        ("unifiedqa/arc_easy_t5", "dev"),
        ("unifiedqa/narrativeqa_t5", "test"),
    ]
    for task, examples in pairs:
        assert examples.task == task.name
        assert task.load(tmp_path, "any") == examples
    task, examples = pairs[0]
    assert task.evaluate(["x", "Y"], examples) == {"exact_match": pytest.approx(200 / 3), "f1": pytest.approx(200 / 3)}


def test_a_file_with_only_inputs_and_targets_is_accepted(write):
    path = write("mine.jsonl", '{"input": "a", "target": "b"}\n\n{"input": "c", "target": "d"}\n')
    [(task, examples)] = task_from_file(path)
    assert (task.name, examples.size, [row.key for row in examples.rows]) == ("mine", 2, ["0", "1"])
    assert task.evaluate(["b", "x"], examples) == {"exact_match": 50.0, "f1": 50.0}
    assert load_prepared(path) == [examples]


def test_inputs_without_answers_can_be_predicted_but_not_scored(write):
    [(task, examples)] = task_from_file(write("ask.jsonl", '{"input": "a", "note": 1}\n'))
    assert (examples.rows[0].input, examples.rows[0].target, examples.rows[0].answers) == ("a", "", ())
    assert examples.rows[0].metadata == {"note": 1}
    with pytest.raises(DataError, match="Found no answer for example 0; expected one to score against"):
        task.evaluate(["b"], examples)


def test_two_splits_of_one_data_set_are_refused(write):
    path = write("mixed.jsonl", '{"input": "a", "split": "dev"}\n{"input": "b", "split": "test"}\n')
    with pytest.raises(DataError, match=r"mixed\.jsonl: found several splits of mixed; expected one"):
        task_from_file(path)


def test_an_empty_file_is_refused(write):
    with pytest.raises(DataError, match=r"empty\.jsonl: found no line"):
        load_prepared(write("empty.jsonl", ""))


@pytest.mark.long
def test_token_counts_are_equal_with_one_and_two_processes(shared: Path, tmp_path: Path):
    tokenizer = str(shared / "models" / "t5-tokenizer")
    counts = []
    for workers in (1, 2):
        done = prepare(
            ["openbookqa"],
            input=shared / "data" / "unifiedqa",
            output=tmp_path / str(workers),
            tokenizer=tokenizer,
            workers=workers,
        )
        counts.append([row["num_t5_toks"] for row in lines(done.path)])
    assert counts[0] == counts[1]
    from transformers import AutoTokenizer

    first = lines(done.path)[0]["input"]
    assert counts[0][0] == len(AutoTokenizer.from_pretrained(tokenizer).tokenize(first))
