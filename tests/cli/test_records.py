"""Result records that `graftwork evaluate` prints."""

from __future__ import annotations

import json
import math

import pytest

from graftwork.cli import verbs
from graftwork.demo import shipped_model
from graftwork.metrics.results import ResultRow, Results
from graftwork.surgery import coverage

MODEL = shipped_model("encoder_decoder")


@pytest.fixture
def evaluated(monkeypatch):
    def replace_evaluation(*rows: ResultRow) -> None:
        monkeypatch.setattr(verbs, "evaluate", lambda converted, settings, data, run: Results(MODEL, None, rows=rows))

    return replace_evaluation


def row(label: str, seed: int = 0, **scores: float) -> ResultRow:
    return ResultRow("world/facts", "dev", label, scores, size=3, seed=seed)


def test_an_undefined_score_is_printed_as_a_dash_and_others_are_rounded(graftwork, evaluated, data):
    evaluated(row("dense", accuracy=66.666, bleu=math.nan), row("converted", accuracy=0.0))
    outcome = graftwork("evaluate", MODEL, "--task", "world/facts", "--data", data, "--json")
    common = {"task": "world/facts", "split": "dev"}
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == [
        {"setting": "dense", **common, "accuracy": 66.67, "size": 3},
        {"setting": "converted", **common, "accuracy": 0.0, "size": 3},
    ]


def test_a_score_that_some_settings_lack_has_a_column_and_seeds_are_shown_when_they_differ(graftwork, evaluated, data):
    evaluated(row("dense", bleu=1.0), row("converted", seed=1, bleu=math.nan))
    printed = json.loads(graftwork("evaluate", MODEL, "--task", "world/facts", "--data", data, "--json").out)
    assert [(one["seed"], one["bleu"]) for one in printed] == [(0, 1.0), (1, "–")]


def test_families_are_listed_with_the_reasons_of_refusals(graftwork):
    rows = json.loads(graftwork("list", "families", "--json").out)
    assert [row["name"] for row in rows] == list(coverage.table())
    row = next(row for row in rows if row["name"] == "deberta-v2")
    assert "attention interface" in row["topk attention"]
    assert row["topk feed-forward"] == "verified"
    assert next(row for row in rows if row["name"] == "llama")["regrad"] == "tested"
    printed = graftwork("list", "families").out
    assert "tested" in printed
    assert "refused" not in printed
