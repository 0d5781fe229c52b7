"""No trained weights or results are replaced silently; weights and their record are one commit."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from graftwork.core import commits
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, NonFiniteError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save, write_model
from graftwork.methods.topk import TopK
from graftwork.metrics.results import ResultRow, Results, merge_results
from graftwork.pipeline import training as pipeline
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.training import train
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import read_run, write_run
from graftwork.settings.training import TrainingSettings
from tiny_models import tiny_model, word_tokenizer


class Killed(BaseException):
    """Replaces SIGKILL."""


def start(k=6):
    return convert(tiny_model("t5", dtype=torch.float32), TopK(feed_forward_k=k), tokenizer=word_tokenizer())


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"input": f"w{n} w9", "target": "w5"}) + "\n" for n in range(4, 12)))
    return file


@pytest.fixture
def settings(rows):
    return TrainingSettings(
        tasks=(str(rows),),
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
    )


@pytest.fixture
def run(tmp_path):
    save(start(), tmp_path / "run")
    return tmp_path / "run"


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_conversion_does_not_replace_a_training(run, settings, rows):
    train(str(run), settings)
    evaluate(run, [str(rows)], settings=EvaluationSettings(max_new_tokens=2))
    trained = weights(run)
    with pytest.raises(ConfigError, match=r"already contains model, train, predictions, results\.json"):
        save(start(), run)
    with pytest.raises(ConfigError, match="already contains train"):
        load(run).save(run)
    assert same(weights(run), trained)
    (run / "best.json").write_text("{}")
    (run / "report.md").write_text("")
    start().save(run, overwrite=True)
    assert not same(weights(run), trained)
    assert RunFolder(run).derived() == []
    assert read_run(RunFolder(run)).train is None
    again = train(str(run), settings)
    assert again.phases["finetune"]["train_loss"] > 0
    assert same(weights(run), trained)


def test_a_conversion_replaces_an_equal_model_only(run):
    before = weights(run)
    save(start(), run)
    with pytest.raises(ConfigError, match="already contains model"):
        save(start(k=3), run)
    with pytest.raises(ConfigError, match="already contains model"):
        save(convert(tiny_model("t5", seed=1, dtype=torch.float32), TopK(feed_forward_k=6)), run)
    assert same(weights(run), before)


@pytest.mark.parametrize("moment", ["staging", "committed"])
def test_a_killed_conversion_leaves_model_and_configuration_of_one_version(run, monkeypatch, moment):
    before = read_run(RunFolder(run))
    with monkeypatch.context() as patched:
        if moment == "staging":
            patched.setattr(commits, "_share", lambda folder: (_ for _ in ()).throw(Killed))
        else:
            own = commits.remove_path
            patched.setattr(commits, "remove_path", lambda path: (own(path), (_ for _ in ()).throw(Killed)))
        with pytest.raises(Killed):
            start(k=3).save(run, overwrite=True)
    k = load(run).methods[0].config.feed_forward_k
    assert (read_run(RunFolder(run)).method or {})["feed_forward_k"] == k == (6 if moment == "staging" else 3)
    assert (before.method or {})["feed_forward_k"] == 6


def test_a_lora_training_killed_before_its_finished_file_does_not_train_twice(run, settings, monkeypatch):
    pytest.importorskip("peft")
    settings = replace(settings, lora={"r": 2, "target_modules": ("q", "v")})
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_finished", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(str(run), settings)
    trained = weights(run)
    assert not (run / "train" / "finetune" / "finished.json").exists()
    train(str(run), settings)
    assert same(weights(run), trained)
    assert (run / "train" / "finetune" / "finished.json").exists()


def test_a_finished_training_is_extended_by_more_steps(settings, tmp_path, caplog):
    base, run = tmp_path / "base", tmp_path / "run"
    tiny_model("t5", dtype=torch.float32).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    for name in ("run", "whole"):
        save(convert(load(base), TopK(feed_forward_k=6)), tmp_path / name)
    train(str(run), settings)
    longer = replace(settings, max_steps=4)
    train(str(run), longer)
    train(str(tmp_path / "whole"), longer)
    assert same(weights(run), weights(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (run / "train/finetune/log.jsonl").read_text().splitlines()]
    assert [step for step in steps if step < 4] == [1, 2, 3]
    caplog.clear()
    train(str(run), longer)
    assert "is finished" in caplog.text
    with pytest.raises(ConfigError, match="max_steps was 4, is 3"):
        train(str(run), replace(settings, max_steps=3))
    with pytest.raises(ConfigError, match="learning_rate"):
        train(str(run), replace(longer, max_steps=6, learning_rate=1.0))


def test_a_training_that_fails_before_its_first_step_leaves_the_run_open(run, settings, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("graftwork.training.trainer.PhaseTrainer.training_step", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(str(run), settings)
    assert (run / "train" / "finetune" / "tensorboard").exists()
    train(str(run), replace(settings, learning_rate=1e-3))


def test_an_interrupted_run_names_its_checkpoint(run, settings, rows, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_model", lambda *given, **options: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(str(run), settings)
    evaluate(run, [str(rows)], settings=EvaluationSettings(max_new_tokens=2))
    assert "evaluating the model before training; `--checkpoints last` scores checkpoint 2" in caplog.text
    caplog.clear()
    train(str(run), settings)
    evaluate(run, [str(rows)], settings=EvaluationSettings(max_new_tokens=2))
    assert "before training" not in caplog.text


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_training_that_diverges_writes_no_model(run, settings, optim):
    before = weights(run)
    with pytest.raises(NonFiniteError) as raised:
        train(str(run), replace(settings, max_steps=4, learning_rate=1e30, optim=optim, max_grad_norm=None))
    assert "at step 1; no checkpoint was written before" in str(raised.value)
    assert same(weights(run), before)
    assert not (run / "train" / "finetune" / "finished.json").exists()
    assert not list((run / "train" / "finetune").glob("checkpoint-*"))


@pytest.mark.parametrize("part", ["loss", "gradient norm"])
def test_a_training_stops_at_the_step_whose_loss_or_gradient_is_not_finite(run, settings, monkeypatch, part):
    from graftwork.training.phases import Finetune

    own, calls = Finetune.step, []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("nan")

    def step(self, model, batch):
        calls.append(1)
        values = own(self, model, batch)
        if len(calls) < 3:
            return values
        return {"loss": values["loss"] * float("inf") if part == "loss" else Poison.apply(values["loss"])}

    monkeypatch.setattr(Finetune, "step", step)
    with pytest.raises(
        NonFiniteError, match=rf"The {part} is (inf|nan) at step 3; the last checkpoint is .*checkpoint-2"
    ):
        train(str(run), replace(settings, max_steps=5))


def test_an_evaluation_changes_its_own_section_only(run, settings, rows):
    train(str(run), settings, data="elsewhere")
    folder = RunFolder(run)
    before = read_run(folder)
    evaluate(run, [str(rows)], data=run.parent, settings=EvaluationSettings(max_new_tokens=2))
    after = read_run(folder)
    assert replace(after, evaluate=None, notes=()) == replace(before, evaluate=None, notes=())
    assert after.evaluate is not None
    assert "evaluated with the files in" in after.notes[0]


def test_a_refused_training_keeps_what_an_evaluation_recorded_meanwhile(run, settings, monkeypatch):
    folder = RunFolder(run)

    def refuse(*given, **options):
        write_run(folder.run_file, replace(read_run(folder), evaluate=EvaluationSettings(tasks=("a",))))
        raise ConfigError("refused")

    monkeypatch.setattr(pipeline, "train_phases", refuse)
    with pytest.raises(ConfigError, match="refused"):
        train(str(run), settings)
    recorded = read_run(folder)
    assert recorded.train is None
    assert recorded.evaluate is not None


def test_results_of_evaluations_at_the_same_time_are_all_kept(tmp_path):
    folder = RunFolder(tmp_path)
    threads = [
        threading.Thread(
            target=lambda number=number: merge_results(
                folder, Results("m", None, rows=(ResultRow(f"task {number}", "dev", "converted", {}, 1),))
            )
        )
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Results.read(folder.results_file).rows) == 8


def test_an_equal_evaluation_at_the_same_time_is_refused(run, rows, monkeypatch):
    from graftwork.evaluation import prediction

    own, refused = prediction._generate, []

    def generate(*given):
        def second():
            with pytest.raises(ConfigError, match="Another process is writing to"):
                evaluate(run, [str(rows)], settings=EvaluationSettings(max_new_tokens=2))
            refused.append(1)

        if not refused:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return own(*given)

    monkeypatch.setattr(prediction, "_generate", generate)
    evaluate(run, [str(rows)], settings=EvaluationSettings(max_new_tokens=2))
    assert refused
    lines = next((run / "predictions").glob("*.converted.jsonl")).read_text().splitlines()
    assert len({json.loads(line)["row"] for line in lines}) == len(lines) == 8


def test_a_conversion_is_refused_while_a_training_holds_the_run(run):
    with RunFolder(run).training(), pytest.raises(ConfigError, match="Another process is training in"):
        save(start(), run)


def test_a_run_in_a_read_only_folder_loads(run):
    modes = {path: path.stat().st_mode for path in [run, *run.rglob("*")]}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        names = sorted(path.name for path in run.iterdir())
        load(run)
        assert sorted(path.name for path in run.iterdir()) == names
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_the_record_of_a_training_is_part_of_the_model_folder(run, settings):
    train(str(run), settings)
    manifest = json.loads((run / "model" / "graftwork.json").read_text())
    finished = json.loads((run / "train" / "finetune" / "finished.json").read_text())
    assert manifest["training"]["phases"]["finetune"]["train_loss"] == finished["train_loss"]
    assert manifest["digest"] == finished["digest"]
    write_model(load(run), RunFolder(run))
    assert "training" not in json.loads((run / "model" / "graftwork.json").read_text())
