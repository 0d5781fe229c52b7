"""Plots: the numbers, labels and ticks that are drawn."""

from __future__ import annotations

import re

import pytest

from graftwork.errors import CheckpointMismatchError
from graftwork.metrics.results import CostRow, ResultRow
from graftwork.reporting import plots
from graftwork.reporting.picture import Picture, check_svg
from graftwork.reporting.plots import Bar


@pytest.fixture
def figures(monkeypatch):
    found = []
    monkeypatch.setattr(plots, "finish_figure", lambda figure, axes: found.append(figure) or b"")
    return found


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_bars_are_labelled_with_one_decimal(figures):
    plots.scores_of_runs({"t": [Bar("a", 79.04), Bar("b", 8.06)]})
    (axes,) = figures[0].axes
    assert {"79.0", "8.1"} <= {text.get_text() for text in axes.texts}


def test_costs_are_drawn_in_mebibytes_over_sorted_lengths(figures):
    rows = [
        CostRow("dense", length, seconds, saved, peak_bytes=None)
        for length, seconds, saved in ((256, 0.5, 6 * 2**20), (128, 0.25, 3 * 2**20))
    ]
    plots.memory_against_length(rows)
    plots.time_against_length(rows)
    memory, time = (figure.axes[0] for figure in figures)
    assert [points(line) for line in memory.lines] == [[(128, 3.0), (256, 6.0)]]
    assert [points(line) for line in time.lines] == [[(128, 250.0), (256, 500.0)]]
    assert list(memory.get_xticks()) == list(time.get_xticks()) == [128, 256]


def test_only_long_names_of_layers_are_slanted(figures):
    plots.per_layer({"k=2": {"layers.10.mlp": 0.5, "layers.11.mlp": 0.25}}, "share")
    plots.per_layer({"k=2": {"encoder.block.0": 0.5}}, "share")
    short, long = (figure.axes[0].get_xticklabels() for figure in figures)
    assert [(text.get_text(), text.get_rotation()) for text in short] == [("10", 0.0), ("11", 0.0)]
    assert [(text.get_text(), text.get_rotation()) for text in long] == [("encoder 0", 30.0)]


def explained(count: int, task: str, accuracy: float) -> ResultRow:
    settings = {"train.mixture": f"movie_rationales_{count}_explanations"}
    return ResultRow(task, "validation", f"{task}{count}", {"accuracy": accuracy}, size=2, settings=settings)


def test_scores_over_explained_examples_are_sorted_and_may_share_a_count(figures):
    rows = [explained(1000, "a", 90.0), explained(100, "a", 80.0), explained(100, "b", 70.0)]
    plots.reasons_against_count(rows)
    (axes,) = figures[0].axes
    assert points(axes.lines[0]) == [(100, 80.0), (100, 70.0), (1000, 90.0)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "1000"]
    assert list(axes.get_xticks(minor=True)) == []


def drawn() -> Picture:
    return plots.over_steps({"a $b$ <c>": [(1, 0.5), (2, 0.25)], "dense": [(1, 0.5), (2, 1.0)]}, "loss")


def test_a_picture_has_the_points_of_its_lines_where_they_are_drawn():
    picture = drawn()
    assert [(line.name, line.axis) for line in picture.lines] == [("a $b$ <c>", "step"), ("dense", "step")]
    points = {(line.name, point.at, point.value): (point.x, point.y) for line in picture.lines for point in line.points}
    first, last = points["dense", "1", "0.5 loss"], points["dense", "2", "1 loss"]
    assert first == points["a $b$ <c>", "1", "0.5 loss"]
    # y grows downwards
    assert first[0] < last[0] < 72 * plots.SIZE[0]
    assert last[1] < first[1] < 72 * plots.SIZE[1]
    # the path of the line passes through the points
    assert f"L {last[0]:.1f}"[:-1] in picture.svg


def test_svgs_of_a_page_share_no_ids_and_follow_the_scheme():
    one, other = drawn().inline("one"), drawn().inline("other")
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', one)) <= ids[0]
    assert "var(--ink)" in one
    assert not re.search(r"#[0-9a-f]{6}\b", one)
    assert not re.search(r"https?:|<script|<style", one)
    assert drawn().svg == drawn().svg


def test_an_svg_from_a_file_must_be_a_plot():
    svg = drawn().inline("one")
    assert check_svg(svg, "here") == svg
    assert check_svg("", "here") == ""
    for attack in (
        svg.replace("<g>", "<g><script>alert(1)</script>", 1),
        svg.replace("<g>", '<g onload="alert(1)">', 1),
        svg.replace("<g>", '<a href="javascript:alert(1)">', 1).replace("</g>", "</a>", 1),
        svg.replace('href="#', 'href="https://a.b/#', 1),
        svg.replace("<g>", '<g style="fill: url(https://a.b/c.svg#d)">', 1),
        svg.replace("<g>", "<g><foreignObject></foreignObject>", 1),
        svg + "<p>text</p>",
        "<!DOCTYPE svg [<!ENTITY a 'b'>]>" + svg,
        "not an SVG",
    ):
        assert attack != svg
        with pytest.raises(CheckpointMismatchError, match="no plot of Graftwork"):
            check_svg(attack, "report.json")
