"""Comparisons with the dense model: verdicts by sign, intervals, the overview of methods and its place on a page."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from graftwork.reporting.method_overview import PICTURE, TABLE, MethodNumbers, overview_of_methods
from graftwork.reporting.render import Section, to_html
from graftwork.reporting.verdicts import Comparison, Verdict, compare_scores, compare_times, sorted_by_verdict
from reporting.html_rules import violations


def comparison(dense: float, graft: float, **changes) -> Comparison:
    made = Comparison("score", dense, graft, "%", 200, "questions", higher_is_better=True)
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("numbers", "higher", "interval", "verdict"),
    [
        ((80.0, 90.0), True, (5.0, 15.0), Verdict.GAIN),
        ((80.0, 70.0), True, (-15.0, -5.0), Verdict.COST),
        ((10.0, 5.0), False, (-6.0, -4.0), Verdict.GAIN),
        ((10.0, 20.0), False, (8.0, 12.0), Verdict.COST),
        ((80.0, 82.0), True, (-1.0, 5.0), Verdict.UNCLEAR),
        ((80.0, 82.0), True, (0.0, 5.0), Verdict.UNCLEAR),
        ((10.0, 5.0), False, None, Verdict.GAIN),
        ((5.0, 10.0), False, None, Verdict.COST),
        ((5.0, 5.0), True, None, Verdict.UNCLEAR),
        ((80.0, math.nan), True, None, Verdict.UNCLEAR),
        ((80.0, 90.0), True, (math.nan, 15.0), Verdict.UNCLEAR),
        ((math.nan, 1.0), False, (-math.inf, -1.0), Verdict.UNCLEAR),
    ],
)
def test_the_verdict_follows_the_sign_and_the_interval(numbers, higher, interval, verdict):
    assert comparison(*numbers, higher_is_better=higher, interval=interval).verdict is verdict


def test_the_text_contains_both_numbers_the_interval_and_n():
    loss = comparison(97.5, 96.5, interval=(-3.0, -0.5), name="accuracy")
    assert loss.text == "accuracy: 96.5 %, dense 97.5 %; difference −1.0 points [−3.0, −0.5], n = 200 questions"
    memory = comparison(140.0, 35.0, higher_is_better=False, name="memory", unit="MiB")
    assert memory.text == "memory: 35 MiB (0.25×), dense 140.0 MiB; difference −105.0 MiB, n = 200 questions"


def test_scores_are_compared_on_the_examples_that_both_answered():
    dense = {str(number): 100.0 * (number % 2) for number in range(40)}
    graft = {**{str(number): 100.0 for number in range(40)}, "only the graft": 0.0}
    found = compare_scores("accuracy", dense, graft, "questions")
    assert (found.dense, found.graft, found.size) == (50.0, 100.0, 40)
    low, high = found.interval
    assert 30 < low < 50 < high < 70
    assert found.verdict is Verdict.GAIN
    assert compare_scores("accuracy", graft, dense, "questions").verdict is Verdict.COST
    assert compare_scores("accuracy", dense, dense, "questions").verdict is Verdict.UNCLEAR


def test_times_that_overlap_are_no_clear_difference():
    slower = compare_times("t", [0.010, 0.011, 0.012], [0.020, 0.021, 0.030])
    assert (slower.dense, slower.graft, slower.verdict) == (11.0, 21.0, Verdict.COST)
    assert slower.interval == pytest.approx((8.0, 20.0))
    assert compare_times("t", [0.020, 0.021], [0.010, 0.011]).verdict is Verdict.GAIN
    assert compare_times("t", [0.010, 0.020], [0.012, 0.021]).verdict is Verdict.UNCLEAR


def texts_below(page: str, heading: str) -> str:
    return re.search(rf"<h3>{heading}</h3>\s*<ul>(.*?)</ul>", page, re.DOTALL)[1]


def test_a_page_lists_every_comparison_under_its_own_sign():
    own = [
        comparison(80, 90, interval=(5, 15), name="a better score"),
        comparison(80, 70, interval=(-15, -5), name="a worse score"),
        comparison(10, 30, higher_is_better=False, name="a slower pass", unit="ms"),
        comparison(80, 81, interval=(-2, 4), name="an equal score"),
    ]
    accuracy, _, time, memory = own
    overview = overview_of_methods({"topk": MethodNumbers(accuracy, time, memory), "cald": MethodNumbers(*own[:3])})
    sections = [
        Section((), title="Overview", overview=overview),
        Section((), title="topk", verdicts=sorted_by_verdict(own), facts=("a fact",), folded=True),
    ]
    page = to_html(sections, notice="Smoke test")
    assert violations(page) == []
    assert '<p class="notice">Smoke test</p>' in page
    for verdict, names in (
        (Verdict.GAIN, ["a better score"]),
        (Verdict.COST, ["a worse score", "a slower pass"]),
        (Verdict.UNCLEAR, ["an equal score"]),
    ):
        found = texts_below(page, verdict.value)
        assert [one.name for one in own if one.name in found] == names
    assert page.index(PICTURE) < page.index(Verdict.GAIN.value)
    assert next(list(row.values()) for row in overview.tables[TABLE]) == [
        "topk",
        "80.0",
        "90.0",
        "+10.0 points [+5.0, +15.0]",
        "200",
        "10",
        "30",
        "3.00",
        "80",
        "81",
        "1.01",
    ]


def test_the_picture_shows_each_method_beside_dense():
    one = MethodNumbers(comparison(80, 90), comparison(10, 20, unit="ms"), comparison(100, 25, unit="MiB"))
    unmeasured = MethodNumbers(comparison(80, 70), comparison(0, 1, unit="ms"), comparison(10, 20, unit="MiB"))
    picture = overview_of_methods({"topk": one, "regrad": unmeasured}).pictures[PICTURE]
    points = [(line.name, point.at, point.value.split()[0]) for line in picture.lines for point in line.points]
    assert points == [
        ("time: topk", "2", "10"),
        ("memory: topk", "0.25", "10"),
        ("memory: regrad", "2", "-10"),
    ]
