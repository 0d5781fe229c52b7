"""Validation metrics, from the log to the plots of a report."""

import json
import math

import pytest

from graftwork.core.run_folder import RunFolder
from graftwork.errors import IncompleteRunError
from graftwork.metrics.results import CostRow, ResultRow, Results
from graftwork.reporting.curves import POINTS, read_closing, read_curves, thinned
from graftwork.reporting.plots import curves_by_title, plots_of
from graftwork.reporting.render import read_run, write_report
from graftwork.settings.recipe import RunConfig, write_run

LOG = (
    {"step": 1, "loss": 0.7, "layer": 3.0},
    {"step": 2, "eval_loss": 0.6, "eval_accuracy": 50.0, "eval_distance": 2.0},
    {"step": 4, "eval_loss": 0.5, "eval_accuracy": 75.0, "eval_distance": 0.5},
    {"step": 4, "train_runtime": 1.0},
)


def write_log(folder, rows=LOG, phase="distill"):
    path = folder / "train" / phase / "log.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_validation_curves_are_pairs_of_step_and_value(tmp_path):
    write_log(tmp_path)
    assert {name: points for name, points in read_curves(RunFolder(tmp_path)).items() if "/" not in name} == {
        "loss": ((2, 0.6), (4, 0.5)),
        "accuracy": ((2, 50), (4, 75)),
        "distance": ((2, 2), (4, 0.5)),
    }
    assert read_curves(RunFolder(tmp_path / "elsewhere")) == {}


def test_training_metrics_of_the_log_are_curves_too(tmp_path):
    log = (
        {"step": 1, "loss": 0.7, "grad_norm": 2.0, "learning_rate": 0.1, "layer_0": 3.0, "epoch": 0.5},
        {"step": 2, "loss": None, "grad_norm": 1.0, "learning_rate": 0.05, "layer_0": 2.0, "epoch": 1.0},
        {"step": 2, "eval_loss": 0.6, "eval_runtime": 1.0, "eval_samples_per_second": 2.0},
        {"step": 2, "train_runtime": 1.0, "train_loss": 0.5, "total_flos": 3.0},
    )
    write_log(tmp_path, log)
    run = RunFolder(tmp_path)
    assert read_curves(run) == {
        "train/loss": ((1, 0.7),),
        "train/grad_norm": ((1, 2), (2, 1)),
        "train/learning_rate": ((1, 0.1), (2, 0.05)),
        "train/layer_0": ((1, 3), (2, 2)),
        "loss": ((2, 0.6),),
    }
    assert read_closing(run) == {"distill": {"train_loss": 0.5, "train_runtime": 1.0, "steps": 2.0}}


def test_a_metric_of_two_phases_has_a_curve_for_each(tmp_path):
    for phase, loss in (("distill", 0.7), ("project", 9.0)):
        write_log(tmp_path, ({"step": 1, "loss": loss}, {"step": 2, "loss": 0.1}), phase=phase)
    assert read_curves(RunFolder(tmp_path)) == {
        "train/loss, distill": ((1, 0.7), (2, 0.1)),
        "train/loss, project": ((1, 9.0), (2, 0.1)),
    }
    titles = curves_by_title({"training": read_curves(RunFolder(tmp_path))})
    assert {title: list(lines) for title, lines in titles.items()} == {"Training loss": ["distill", "project"]}


def test_a_long_curve_keeps_its_ends_and_spikes():
    points = [(float(step), 100.0 if step in (333, 777) else math.sin(step)) for step in range(100_000)]
    thin = thinned(points)
    assert len(thin) <= POINTS
    assert thin[0] == points[0]
    assert thin[-1] == points[-1]
    assert sum(value == 100.0 for _, value in thin) >= 1
    assert list(thin) == sorted(set(thin) & set(points))
    assert thinned(points[:POINTS]) == tuple(points[:POINTS])


def test_a_report_plots_validation_and_training_curves(tmp_path):
    row = ResultRow("task", "dev", "converted", {"accuracy": 1.0}, 1)
    Results("model", "cald", (row,)).write(tmp_path / "results.json")
    assert not read_run(RunFolder(tmp_path)).training_pictures
    rate = ({"step": 3, "loss": 0.6, "learning_rate": 0.1, "layer": 2.0}, {"step": 4, "learning_rate": 0.2})
    write_log(tmp_path, (*LOG, *rate))
    pictures = read_run(RunFolder(tmp_path)).training_pictures
    assert list(pictures) == [
        "Held-out accuracy while training",
        "Held-out distance while training",
        "Training loss",
        "Held-out loss while training",
        "Learning rate",
        "Training: layer",
    ]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures.values())
    write_report([RunFolder(tmp_path)], formats=["html"], output=None)
    page = (tmp_path / "report.html").read_text()
    assert "<summary>Training curves</summary>" in page
    assert "[[&#34;training&#34;,[[" in page
    assert "step 4: 0.2 learning rate" in page


def test_curves_of_layers_share_a_plot_if_there_is_one_setting():
    own = {"train/layer_0": ((1, 1.0), (2, 2.0)), "train/layer_1": ((1, 1.0), (2, 2.0))}
    assert list(curves_by_title({"training": own})["Training: layer"]) == ["layer 0", "layer 1"]
    assert list(curves_by_title({"a": own, "b": own})) == ["Training: layer 0", "Training: layer 1"]


def test_a_run_that_was_trained_but_not_evaluated_has_a_report(tmp_path):
    with pytest.raises(IncompleteRunError, match=r"graftwork evaluate"):
        write_report([RunFolder(tmp_path)], formats=["html"], output=None)
    write_run(tmp_path / "run.yaml", RunConfig(model="some/model", method={"name": "cald"}))
    write_log(tmp_path, (*LOG[:3], {"step": 4, "train_runtime": 1.5, "train_loss": 0.25}))
    text, page = (path.read_text() for path in write_report([RunFolder(tmp_path)], formats=["md", "html"], output=None))
    for written in (text, page):
        assert "not evaluated yet" in written
        assert "some/model" in written
    assert "| distill | 0.25 | 1.5 | 4 |" in text
    assert "Held-out accuracy while training" in page
    assert ">Scores<" not in page


def test_curves_keep_their_labels_in_json(tmp_path):
    one = Results("m", None, curves={"target": {"accuracy": ((1.0, 50.0),)}})
    two = Results("m", None, curves={"hybrid": {"accuracy": ((1.0, 60.0),)}})
    one.merged(two).write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").curves == {**one.curves, **two.curves}


def test_latency_is_plotted_if_measured():
    def titles(latency):
        cost = tuple(CostRow("dense", length, 0.2, 10, None, "cpu", latency) for length in (8, 16))
        return set(plots_of(Results("m", None, cost=cost)))

    others = {"Time of a training step against length", "Memory saved for backward against length"}
    assert titles(0.1) == {"Latency against length", *others}
    assert titles(None) == others
