"""The WT5 demonstration learns explanations that hold on unseen reviews."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from graftwork.demo.parts.wt5 import REVIEWS, WT5Part
from graftwork.methods.wt5 import WT5
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import run_recipe


@pytest.mark.long
def test_explanations_are_learned_and_occur_in_held_out_reviews(offline_world, tmp_path):
    """At least 90 % of the spans occur in the source, and token F1 is at least twice that of random spans."""
    recipe = WT5Part(tmp_path, offline_world).recipe(REVIEWS)
    single = replace(recipe.at(REVIEWS.point(1000)), over={})
    free = run_recipe(single, tmp_path).scores(REVIEWS.task, "converted")
    assert free["accuracy"] > 80
    assert free["spans_found"] >= 90
    assert free["token_f1"] >= 2 * free["chance_token_f1"] > 0
    answers = next((tmp_path / "predictions").glob("*.converted.details.jsonl"))
    shown = {json.loads(line)["id"] for line in answers.read_text().splitlines()}
    assert shown == {path.name for path in (offline_world / "eraser_movies" / "docs").glob("*_dev_*")}
    model = replace(load(tmp_path), methods=(WT5(constrained=True),))
    held = evaluate(model, settings=single.evaluate, data=offline_world, name="held").scores(REVIEWS.task, "held")
    # constrained spans occur in the source by construction
    assert held["spans_found"] == held["parsed_rate"] == 100
    assert held["token_f1"] >= free["token_f1"]
