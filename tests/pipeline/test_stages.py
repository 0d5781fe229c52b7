"""Stages do in Python what the commands do: each takes a path of a run, and records itself in run.yaml."""

import json
from dataclasses import replace

import pytest
import torch

import graftwork as gw
from graftwork.cli.app import run as command
from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.settings.recipe import read_run

SETTINGS = gw.EvaluationSettings(tasks=("world/facts",), limit=4, max_new_tokens=4, batch_size=4)
TRAINING = gw.TrainingSettings(tasks=("world/keywords",), max_steps=1, per_device_train_batch_size=2)


@pytest.fixture(scope="module")
def data(offline_world):
    return offline_world / "unifiedqa"


@pytest.fixture
def saved(tmp_path):
    """A run saved in Python."""
    model = gw.load(shipped_model("encoder_decoder"), dtype="float32")
    gw.convert(model, gw.TopK(feed_forward_k=64)).save(tmp_path / "run")
    return tmp_path / "run"


def test_saving_records_the_conversion_so_that_commands_can_train_the_run(saved, data, capsys):
    config = read_run(RunFolder(saved))
    assert config.model == shipped_model("encoder_decoder")
    assert config.method["name"] == "topk"
    assert config.method["feed_forward_k"] == 64
    assert config.dtype == "float32"
    words = ["train", str(saved), "--task", "world/keywords", "--data", str(data), "--max-steps", "1"]
    assert command([*words, "--per-device-train-batch-size", "2"]) == 0, capsys.readouterr().err
    after = read_run(RunFolder(saved))
    assert after.train.max_steps == 1
    assert after.data == str(data)
    assert after.method == config.method


def test_a_chained_conversion_records_the_run_that_it_starts_from(saved, tmp_path):
    second = gw.convert(gw.load(saved), gw.WT5())
    second.save(tmp_path / "second")
    config = read_run(RunFolder(tmp_path / "second"))
    assert (config.model, config.method["name"]) == (str(saved), "wt5")


def test_a_model_saved_back_to_its_run_keeps_the_checkpoint_that_the_run_starts_from(saved):
    gw.convert(gw.load(saved), gw.TopK(feed_forward_k=8)).save(saved)
    config = read_run(RunFolder(saved))
    assert config.model == shipped_model("encoder_decoder")
    assert config.method["feed_forward_k"] == 8


def test_every_stage_takes_the_path_of_a_run(saved, data):
    trained = gw.train(str(saved), TRAINING, data=data)
    assert trained.converted.folder.path == saved
    # the run records the lengths that the tasks declare
    assert read_run(RunFolder(saved)).train == replace(TRAINING, max_input_tokens=512, max_target_tokens=100)
    results = gw.evaluate(saved, settings=SETTINGS, data=data)
    assert results.rows[0].size == 4
    assert RunFolder(saved).results_file.exists()
    assert read_run(RunFolder(saved)).evaluate == SETTINGS
    swept = gw.sweep(str(saved), [{"method.feed_forward_k": 8}], SETTINGS, data=data)
    assert [row.label for row in swept.rows] == ["feed_forward_k=8"]
    assert [path.name for path in gw.report(saved)] == ["report.md", "report.html"]


def test_evaluating_a_run_elsewhere_records_the_run_as_its_model(saved, data, tmp_path):
    gw.evaluate(saved, settings=SETTINGS, data=data, run=tmp_path / "other")
    config = read_run(RunFolder(tmp_path / "other"))
    assert (config.model, config.method) == (str(saved), None)


def test_a_refused_training_puts_the_recorded_configuration_back(saved, data):
    before = (saved / "run.yaml").read_text()
    wrong = gw.TrainingSettings(tasks=("world/keywords",), max_steps=1, lora={"no_such_option": 1})
    with pytest.raises(ConfigError, match="lora"):
        gw.train(saved, wrong, data=data)
    assert (saved / "run.yaml").read_text() == before


def test_prediction_in_python_returns_the_records_of_the_command(saved, tmp_path, capsys):
    questions = ["what is the pet of gavis rairtow?", "who is this?"]
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(questions))
    settings = gw.EvaluationSettings(max_new_tokens=4)
    found = gw.predict(saved, questions, settings)
    assert [record["input"] for record in found] == questions
    assert command(["predict", str(saved), "--input", str(file), "--max-new-tokens", "4", "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == found
    written = tmp_path / "answers.jsonl"
    assert gw.predict(str(saved), file, settings, output=written) == found
    assert [json.loads(line)["prediction"] for line in written.read_text().splitlines()] == [
        record["prediction"] for record in found
    ]


def test_prediction_returns_label_and_explanations_of_an_explaining_model():
    model = gw.convert(gw.load(shipped_model("encoder_decoder")), gw.WT5(constrained=True, probabilities=True))
    fields = {"premise": "A chef chops onions.", "hypothesis": "Someone cooks.", "label": 0}
    example = gw.get_task("esnli_eval_v010").format(gw.Record("1", fields))
    record = gw.predict(model, [example], gw.EvaluationSettings(max_new_tokens=24))[0]
    assert record["label"] in record["probabilities"]
    assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert isinstance(record["explanations"], list | tuple)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ((None, "topk"), r"Found 'topk' as method. Expected an instance such as graftwork.TopK"),
        ((None, gw.TopK), r"Found the class TopK as method. Pass an instance: TopK\(…\)"),
        (("runs/first", gw.TopK(feed_forward_k=2)), r"Found 'runs/first' as model. .*graftwork.load"),
    ],
)
def test_a_name_a_class_or_a_path_in_convert_is_answered_with_the_right_call(arguments, advice):
    model, method = arguments
    with pytest.raises(ConfigError, match=advice):
        gw.convert(torch.nn.Linear(2, 2) if model is None else model, method)


def test_one_text_instead_of_a_list_is_refused(saved):
    with pytest.raises(ConfigError, match="Expected a list of texts"):
        gw.predict(saved, "what is this?")


def test_training_without_a_run_folder_is_refused(data):
    with pytest.raises(ConfigError, match="Found no run folder to train in"):
        gw.train(gw.load(shipped_model("encoder_decoder")), TRAINING, data=data)


def test_evaluate_takes_task_objects_beside_names(data):
    task = replace(gw.get_task("world/facts"), name="own_facts")
    found = gw.evaluate(gw.load(shipped_model("encoder_decoder")), [task, "world/facts"], settings=SETTINGS, data=data)
    scores = {row.task: row.scores for row in found.rows}
    assert list(scores) == ["world/facts", "own_facts"]
    assert scores["own_facts"] == scores["world/facts"]
