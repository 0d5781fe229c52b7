"""Re-scored predictions with expected values computed by hand, and paired comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftwork.errors import DataError
from graftwork.reporting.comparison import compare, read_predictions, write_summary

GOLD = {"0": ["Paris"], "1": ["the red cat"], "2": ["yes"], "3": ["Oslo", "Kristiania"]}


def lines(path: Path, texts: dict[str, str], gold: dict[str, list[str]] = GOLD) -> Path:
    rows = [
        {"row": number, "id": name, "input": "?", "prediction": text, "answers": gold[name]}
        for number, (name, text) in enumerate(texts.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    good = {"0": "Answer: Paris\nLyon", "1": "red cat sat", "2": "yes", "3": "Kristiania"}
    poor = {"0": "Lyon", "1": "red cat sat", "2": "yes it is", "3": "Kristiania"}
    return [lines(tmp_path / name / "popqa.converted.jsonl", texts) for name, texts in (("a", good), ("b", poor))]


def test_scores_are_those_of_the_definition(two):
    rows = compare([read_predictions(path) for path in two])
    # F1 of "red cat sat" against "red cat": precision 2/3, recall 1
    assert [row["group"] for row in rows] == ["popqa", "popqa"]
    assert rows[0]["exact_match"] == 75.0
    assert rows[0]["f1"] == pytest.approx(100 * (1 + 0.8 + 1 + 1) / 4)
    assert rows[1]["exact_match"] == 25.0
    assert rows[1]["f1"] == pytest.approx(100 * (0 + 0.8 + 0 + 1) / 4)
    assert "difference" not in rows[0]
    assert rows[1]["difference"] == pytest.approx(-50.0)
    assert rows[1]["low"] <= -50 <= rows[1]["high"] <= 0
    same = compare([read_predictions(two[0]), read_predictions(two[0])])[1]
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0.0, 0.0, 0.0, 1.0)


def test_answers_are_parsed_and_grouped_by_the_data_set_in_the_file_name(tmp_path: Path):
    gold = {"0": ["yes"], "1": ["no"]}
    texts = {"0": "I think yes, it is", "1": "No. It is not"}
    known = lines(tmp_path / "pubmedqa.converted.jsonl", texts, gold)
    renamed = lines(tmp_path / "2wikimultihopqa.converted.jsonl", texts, gold)
    own = lines(tmp_path / "mine.converted.jsonl", texts, gold)
    rows = [compare([read_predictions(path)])[0] for path in (known, renamed, own)]
    assert [(row["group"], row["exact_match"]) for row in rows] == [("pubmedqa", 100.0), ("wiki", 0.0), ("mine", 0.0)]


def test_a_summary_has_equal_scores_and_the_original_names(two, tmp_path: Path):
    system = read_predictions(two[0])
    write_summary(tmp_path / "out" / "summary.json", system, {"bank": "x"})
    stored = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert stored["predictions"]["popqa"]["answer"]["0"] == "Paris"
    assert stored["scores"]["popqa"] == {"em": 75.0, "f1": 95.0, "prec": pytest.approx(91.67), "recall": 100.0}
    assert stored["scores"]["f1"] == 95.0
    assert stored["run"] == {"bank": "x", "counts": {"popqa": 4}, "missing": {"popqa": 0}}
    again = compare([read_predictions(tmp_path / "out" / "summary.json")])[0]
    assert {**again, "file": ""} == {**compare([system])[0], "file": ""}


def test_a_summary_of_the_original_is_scored_against_an_augmented_file(tmp_path: Path):
    theirs = {"predictions": {"popqa": {"answer": {"0": "Paris", "3": "Oslo"}}}, "scores": {}}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    rows = [{"test_id": int(name), "question": "?", "answer": gold, "passages": []} for name, gold in GOLD.items()]
    (tmp_path / "popqa").mkdir()
    (tmp_path / "popqa" / "dev.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="no gold answers of popqa"):
        read_predictions(tmp_path / "theirs.json")
    row = compare([read_predictions(tmp_path / "theirs.json", [tmp_path / "popqa" / "dev.json"])])[0]
    assert (row["questions"], row["missing"], row["exact_match"]) == (4, 2, 50.0)


def test_files_that_cannot_be_compared_are_refused(two, tmp_path: Path):
    fewer = lines(tmp_path / "c" / "popqa.x.jsonl", {"0": "Paris"})
    with pytest.raises(DataError, match="not the same ones"):
        compare([read_predictions(two[0]), read_predictions(fewer)])
    with pytest.raises(DataError, match="two files of one group"):
        write_summary(tmp_path / "s.json", [*read_predictions(two[0]), *read_predictions(two[1])], {})
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="expected lines with prediction and answers"):
        read_predictions(tmp_path / "other.jsonl")
    samples = {"predictions": {"g": {"answer": {"1": "a"}}}, "per_sample": [1]}
    for other in ({"text": "x"}, samples):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match="expected `predictions`"):
            read_predictions(tmp_path / "other.json")
