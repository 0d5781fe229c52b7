"""Validation metrics, from the log to the plots of a report."""

import json

from graftwork.core.run_folder import RunFolder
from graftwork.metrics.results import CostRow, ResultRow, Results
from graftwork.reporting.curves import read_curves
from graftwork.reporting.plots import plots_of
from graftwork.reporting.render import read_run

LOG = (
    {"step": 1, "loss": 0.7, "layer": 3.0},
    {"step": 2, "eval_loss": 0.6, "eval_accuracy": 50.0, "eval_distance": 2.0},
    {"step": 4, "eval_loss": 0.5, "eval_accuracy": 75.0, "eval_distance": 0.5},
    {"step": 4, "train_runtime": 1.0},
)


def write_log(folder, rows=LOG):
    path = folder / "train" / "distill" / "log.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_validation_curves_are_pairs_of_step_and_value(tmp_path):
    write_log(tmp_path)
    assert read_curves(RunFolder(tmp_path)) == {
        "loss": ((2, 0.6), (4, 0.5)),
        "accuracy": ((2, 50), (4, 75)),
        "distance": ((2, 2), (4, 0.5)),
    }
    assert read_curves(RunFolder(tmp_path / "elsewhere")) == {}


def test_a_report_plots_validation_curves(tmp_path):
    row = ResultRow("task", "dev", "converted", {"accuracy": 1.0}, 1)
    Results("model", "cald", (row,)).write(tmp_path / "results.json")
    assert not any("while training" in title for title in read_run(RunFolder(tmp_path)).pictures)
    write_log(tmp_path)
    pictures = read_run(RunFolder(tmp_path)).pictures
    assert {"Held-out accuracy while training", "Held-out distance while training"} <= set(pictures)
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_curves_keep_their_labels_in_json(tmp_path):
    one = Results("m", None, curves={"target": {"accuracy": ((1.0, 50.0),)}})
    two = Results("m", None, curves={"hybrid": {"accuracy": ((1.0, 60.0),)}})
    one.merged(two).write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").curves == {**one.curves, **two.curves}


def test_latency_is_plotted_if_measured():
    def titles(latency):
        cost = tuple(CostRow("dense", length, 0.2, 10, None, "cpu", latency) for length in (8, 16))
        return set(plots_of(Results("m", None, cost=cost)))

    assert titles(0.1) == {"Latency against length", "Time and memory against length"}
    assert titles(None) == {"Time and memory against length"}
