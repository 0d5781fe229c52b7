"""Tables, plots and pages of reports."""

import re

import pytest

from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, IncompleteRunError
from graftwork.metrics.results import CostRow, ResultRow, Results, Sample
from graftwork.reporting import plots
from graftwork.reporting.plots import Bar, plots_of, swept_numbers
from graftwork.reporting.render import score_table, write_report
from graftwork.settings.recipe import Published, RunConfig, write_run


def row(label, score, settings=None, **changes):
    values = {"task": "t", "split": "dev", "size": 10, "settings": settings or {}, "seed": 0, **changes}
    return ResultRow(label=label, scores={"exact_match": score}, **values)


ROWS = (
    row("dense", 80.0, {"method.feed_forward_k": None}),
    row("feed_forward_k=64", 79.0, {"method.feed_forward_k": 64}),
    row("feed_forward_k=8", 40.0, {"method.feed_forward_k": 8}),
)


def results(**changes):
    values = {
        "model": "some/model",
        "method": "topk",
        "rows": ROWS,
        "measures": {"feed_forward_k=8": {"kept_mass/encoder.block.0.layer.1.DenseReluDense": 0.5}},
        "cost": (CostRow("dense", 128, 0.5, 2**20, None), CostRow("dense", 256, 1.0, 2**21, 2**22)),
        "samples": (Sample("t", "a <b> question", ("Yes",), {"dense": "yes", "feed_forward_k=8": "<script>"}),),
    }
    return Results(**{**values, **changes})


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    published = Published("t", "exact_match", 79.2, 0.3, "a table", {"method.feed_forward_k": 64})
    far = Published("t", "exact_match", 60.0, 1.0, "a table", {"method.feed_forward_k": 8})
    write_run(folder.run_file, RunConfig(model="some/model", published=(published, far)))
    results().write(folder.results_file)
    return folder


def test_results_survive_a_json_round_trip(tmp_path):
    results().write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results()


def test_published_numbers_are_shown_next_to_ours(run):
    table = score_table(ROWS, [Published("t", "exact_match", 79.2, 0.3, "a table", {"method.feed_forward_k": 64})])
    cells = {label: cells[0] for label, cells in table.rows}
    assert cells["feed_forward_k=64"].reproduced is True
    assert cells["dense"].published is None
    write_report([run], formats=["md"], output=None)
    text = run.report("md").read_text()
    assert "| feed_forward_k=64 | 79.0 (published 79.2, reproduced) |" in text
    assert "| feed_forward_k=8 | 40.0 (published 60, differs) |" in text


def test_the_report_names_devices_and_types_of_the_scores(tmp_path):
    folder = RunFolder(tmp_path / "run")
    write_run(folder.run_file, RunConfig(model="some/model"))
    rows = (row("dense", 80.0, device="cuda:0", dtype="bfloat16"), row("k", 79.0, device="cpu", dtype="float32"))
    results(rows=rows).write(folder.results_file)
    write_report([folder], formats=["md", "html"], output=None)
    for kind in ("md", "html"):
        assert "Computed on cpu in float32 and cuda:0 in bfloat16." in folder.report(kind).read_text()


def test_final_numbers_of_the_training_are_shown_if_there_was_one(tmp_path):
    for training in ({}, {"finetune": {"train_loss": 0.25, "train_runtime": 3.0}}):
        folder = RunFolder(tmp_path / str(len(training)))
        results(training=training).write(folder.results_file)
        (path,) = write_report([folder], formats=["md"], output=None)
        assert ("Training:" in path.read_text()) is bool(training)
        assert ("| finetune |" in path.read_text()) is bool(training)


def test_several_runs_share_one_table_with_published_numbers(run, tmp_path):
    other = RunFolder(tmp_path / "elsewhere" / "run")
    results(
        method="cald",
        rows=(row("dense", 81.0), row("unguided", 60.0, task="u")),
        cost=(),
        training={"distill": {"train_loss": 0.25}, "meta": {"epoch": 2.0}},
    ).write(other.results_file)
    written = write_report([run, other], formats=["md", "html"], output=tmp_path / "both")
    text, page = (path.read_text() for path in written)
    near = f"{tmp_path.name}/run"
    assert f"| {near} | topk | feed_forward_k=64 | 79.0 (published 79.2, reproduced) | – |" in text
    assert "| elsewhere/run | cald | unguided | – | 60.0 |" in text
    assert f"| {near} | dense | 256 | – | 1000.0 | 2.00 | cpu |" in text
    assert "| distill | 0.25 | – |" in text
    assert "| meta | – | 2 |" in text
    assert "<figcaption>First score of each task" in page
    assert "<h2>elsewhere/run</h2>" in page
    write_report([run], formats=["md"], output=tmp_path / "one")
    assert "all runs" not in (tmp_path / "one" / "report.md").read_text()


def test_the_plot_of_several_runs_has_a_bar_per_score_and_a_marker_on_the_published_bar(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "finish_figure", lambda figure, axes: figures.append(figure) or b"")
    bars = {"t accuracy": [Bar("a: dense", 80.0, dense=True), Bar("a: k=2", 70.0, 71.5)], "u f1": [Bar("b: x", 60.0)]}
    plots.scores_of_runs(bars)
    first, second = figures[0].axes
    assert [bar.get_width() for bar in first.patches] == [80.0, 70.0]
    assert [list(line.get_xdata()) for line in first.lines] == [[71.5]]
    published = first.patches[1]
    assert list(first.lines[0].get_ydata()) == [published.get_y() + published.get_height() / 2]
    assert [bar.get_width() for bar in second.patches] == [60.0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a: dense", "a: k=2"]


def test_seeds_are_averaged_with_their_spread():
    table = score_table([row("a", 1.0, seed=0), row("a", 3.0, seed=1)])
    assert table.rows[0][1][0].text == "2.0 ± 1.0"


def test_a_setting_that_was_not_measured_shows_a_dash():
    table = score_table([row("a", 1.0), row("b", 2.0, task="u")])
    assert [cell.text for cell in table.rows[0][1]] == ["1.0", "–"]


def test_the_page_is_self_contained_and_escapes_model_output(run):
    write_report([run], formats=["html"], output=None)
    page = run.report("html").read_text()
    assert page.count("<script") == 1
    assert "a &lt;b&gt; question" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/png;base64,") == 4


def test_right_and_wrong_answers_have_different_classes(run):
    write_report([run], formats=["html"], output=None)
    page = run.report("html").read_text()
    assert '<span class="right">✓ yes</span>' in page
    assert '<span class="wrong">✗ <mark class="missed">&lt;script&gt;</mark></span>' in page


def test_plots_exist_for_every_measurement():
    assert list(plots_of(results())) == [
        "Score against feed_forward_k",
        "Kept mass per layer",
        "Time of a training step against length",
        "Memory saved for backward against length",
    ]
    assert plots_of(results(rows=(), measures={}, cost=())) == {}
    assert all(picture.png.startswith(b"\x89PNG") for picture in plots_of(results()).values())


def test_only_numeric_settings_become_an_axis():
    assert swept_numbers(ROWS) == ["method.feed_forward_k"]
    assert (
        swept_numbers([row("a", 1.0, {"method.selection": "gate"}), row("b", 1.0, {"method.selection": "product"})])
        == []
    )


def test_later_results_replace_earlier_ones_and_samples_are_merged():
    newer = results(
        rows=(row("dense", 90.0),),
        cost=(),
        measures={},
        samples=(Sample("t", "a <b> question", ("Yes",), {"x": "no"}),),
    )
    merged = results().merged(newer)
    assert merged.scores("t", "dense") == {"exact_match": 90.0}
    assert merged.scores("t", "feed_forward_k=8") == {"exact_match": 40.0}
    assert len(merged.cost) == 2
    assert merged.samples[0].by_answer() == {"yes": ["dense"], "<script>": ["feed_forward_k=8"], "no": ["x"]}


def test_several_runs_share_one_report(run, tmp_path):
    other = RunFolder(tmp_path / "other")
    results(model="another/model").write(other.results_file)
    (path,) = write_report([run, other], formats=["md"], output=tmp_path / "both")
    text = path.read_text()
    assert path.parent == tmp_path / "both"
    assert "## run" in text
    assert "`another/model`" in text


def test_a_run_without_results_is_refused(tmp_path):
    with pytest.raises(IncompleteRunError, match=r"results\.json.*graftwork evaluate"):
        write_report([RunFolder(tmp_path)], formats=["md"], output=None)


def test_an_unknown_format_is_refused(run):
    with pytest.raises(ConfigError, match="pdf"):
        write_report([run], formats=["pdf"], output=None)
