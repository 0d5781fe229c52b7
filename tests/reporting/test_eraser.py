"""The results format of ERASER, by its definition in section 2.7 of the specification."""

import json

import pytest

from graftwork.core.files import read_lines, write_text
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder
from graftwork.errors import ConfigError
from graftwork.metrics.results import Results
from graftwork.reporting.eraser import eraser_results, write_eraser_results
from graftwork.reporting.render import write_report

ENTRY = {
    "id": "a:0:1",
    "document": "a",
    "label": "positive",
    "gold_label": "positive",
    "class_names": {"negative": "NEG", "positive": "POS"},
    "spans": [[1, 3], [7, 8]],
    "probabilities": {"negative": 0.25, "positive": 0.75},
    "probabilities_without": {"negative": 0.5, "positive": 0.5},
    "token_scores": [0.0, 1.0, 1.0],
}


def test_every_field_matches_the_format():
    assert eraser_results([ENTRY]) == [
        {
            "annotation_id": "a:0:1",
            "rationales": [
                {
                    "docid": "a",
                    "hard_rationale_predictions": [
                        {"start_token": 1, "end_token": 3},
                        {"start_token": 7, "end_token": 8},
                    ],
                    "soft_rationale_predictions": [0.0, 1.0, 1.0],
                }
            ],
            "classification": "POS",
            "classification_scores": {"NEG": 0.25, "POS": 0.75},
            "comprehensiveness_classification_scores": {"NEG": 0.5, "POS": 0.5},
        }
    ]


def test_an_optional_field_is_present_for_all_answers_or_none():
    other = {key: value for key, value in ENTRY.items() if key not in ("probabilities_without", "token_scores")}
    rows = eraser_results([ENTRY, {**other, "label": "maybe", "spans": []}])
    assert all("comprehensiveness_classification_scores" not in row for row in rows)
    assert all("soft_rationale_predictions" not in row["rationales"][0] for row in rows)
    # a label that is neither of the two classes
    assert rows[1]["classification"] == "NEG"
    assert rows[1]["rationales"][0]["hard_rationale_predictions"] == []


def test_classes_need_their_probabilities():
    other = {key: value for key, value in ENTRY.items() if key != "probabilities"}
    for row in eraser_results([ENTRY, other]):
        assert sorted(row) == ["annotation_id", "rationales"]


def test_results_of_several_settings_are_written_into_new_and_existing_folders(tmp_path):
    run = RunFolder(tmp_path / "run")
    for name in ("movies/a", "movies/b"):
        write_text(run.predictions / f"{name}{DETAILS_SUFFIX}", json.dumps(ENTRY) + "\n")
    for _ in range(2):
        written = write_eraser_results(run, tmp_path / "out" / "eraser")
        assert [path.relative_to(tmp_path / "out" / "eraser").parent.name for path in written] == ["movies", "movies"]
        assert [list(read_lines(path)) for path in written] == [eraser_results([ENTRY])] * 2


def test_a_run_without_eraser_spans_is_refused(tmp_path):
    Results("m", None).write(RunFolder(tmp_path).results_file)
    with pytest.raises(ConfigError, match="Evaluate a task of Movies or MultiRC"):
        write_report([RunFolder(tmp_path)], formats=["eraser"], output=None)
