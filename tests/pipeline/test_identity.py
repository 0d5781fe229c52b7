"""A run is identified by its content: changed weights are refused, and nothing of other weights is reused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError, NonFiniteError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save, write_model
from graftwork.grafting.identity import weights_digest
from graftwork.methods.cald import Cald
from graftwork.methods.topk import TopK
from graftwork.metrics.results import Results
from graftwork.pipeline import training
from graftwork.pipeline.diagnosis import diagnose
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.training import train
from graftwork.reporting.render import report
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.finiteness import non_finite
from tiny_models import TINY, tiny_model, word_tokenizer

LABELS = ("negative", "positive")
STEPS = {"per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A trained and evaluated CALD classifier, its rows, and its training settings."""
    folder = tmp_path_factory.mktemp("cald")
    rows = folder / "rows.jsonl"
    words = ("bad", "good")
    rows.write_text(
        "".join(
            json.dumps({"input": f"a {words[n % 2]} film number {n}", "target": LABELS[n % 2]}) + "\n" for n in range(8)
        )
    )
    model = load(shipped_model("encoder"), dtype="float32", labels=LABELS)
    save(convert(model, Cald(rank=8)), folder / "run")
    settings = TrainingSettings(tasks=(str(rows),), max_steps=4, **STEPS)
    train(load(folder / "run"), settings, run=folder / "run")
    evaluate(folder / "run", [str(rows)])
    return folder, settings


@pytest.fixture
def run(classifier, tmp_path):
    """A copy of the classifier's run, and its training settings."""
    folder, settings = classifier
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path / "run", settings


def damage(folder, share=0.59):
    """Replace a share of the weights by random ones."""
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(0)
    names = sorted(tensors, key=lambda name: -tensors[name].numel())
    total, changed = sum(tensor.numel() for tensor in tensors.values()), 0
    for name in names:
        if changed < share * total:
            tensors[name] = torch.randn_like(tensors[name])
            changed += tensors[name].numel()
    save_file(tensors, file, metadata={"format": "pt"})


def test_replaced_weights_are_refused_by_every_stage(run):
    folder, settings = run
    damage(folder)
    with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors has changed"):
        load(folder)
    with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors"):
        evaluate(folder, list(settings.tasks))
    with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors"):
        train(str(folder), settings)
    with pytest.raises(CheckpointMismatchError, match=r"model\.safetensors"):
        report([folder])
    findings, healthy = diagnose(str(folder))
    assert not healthy
    assert any(entry["check"] == "files" and "model.safetensors" in entry["found"] for entry in findings)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_changed_configuration_or_tokenizer_is_refused(run, name):
    file = run[0] / "model" / name
    file.write_text(file.read_text().replace("}", " }", 1))
    with pytest.raises(CheckpointMismatchError, match=f"{name} has changed"):
        load(run[0])


def test_nothing_that_belongs_to_other_weights_is_reused(run, caplog):
    folder, settings = run
    other = load(folder)
    with torch.no_grad():
        other.model.classifier.out_proj.weight.neg_()
        other.model.classifier.out_proj.bias.neg_()
    before = Results.read(RunFolder(folder).results_file).rows[0]
    predicted = next((folder / "predictions").glob("*converted.jsonl"))
    answers = predicted.read_text()
    # the run's model is exchanged with its manifest, as by another program
    write_model(other, RunFolder(folder))
    assert load(folder)
    with pytest.raises(CheckpointMismatchError, match=r"finished\.json belongs to weights"):
        train(str(folder), settings)
    with caplog.at_level(logging.WARNING), pytest.raises(IncompleteRunError, match="measured on earlier ones"):
        report([folder])
    assert "left out, because the weights in model/ have changed since: converted" in caplog.text
    row = evaluate(folder, list(settings.tasks)).rows[0]
    assert row.digest == weights_digest(other.model) != before.digest
    assert predicted.read_text() != answers
    name = next(iter(before.scores))
    assert row.scores[name] == pytest.approx(100 - before.scores[name])
    caplog.clear()
    report([folder])
    assert "left out" not in caplog.text
    assert "Measured on other weights" not in (folder / "report.md").read_text()


def test_predictions_are_reused_for_equal_weights_only(run, monkeypatch):
    folder, settings = run
    calls = []
    from graftwork.evaluation import prediction

    own = prediction._classify
    monkeypatch.setattr(prediction, "_classify", lambda *given: calls.append(1) or own(*given))
    evaluate(folder, list(settings.tasks))
    assert not calls
    model = load(folder)
    with torch.no_grad():
        # no output of the fixed input shows this change
        model.model.get_input_embeddings().weight[-1, 0] += 1
    evaluate(model, list(settings.tasks), run=folder)
    assert calls


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_digest_is_the_same_after_saving_and_loading(name, tmp_path):
    fused = name in ("bart", "opt")
    method = TopK(attention_k=2) if fused else TopK(feed_forward_k=6)
    converted = convert(tiny_model(name, dtype=torch.float32), method, tokenizer=word_tokenizer())
    save(converted, tmp_path)
    manifest = json.loads((tmp_path / "model" / "graftwork.json").read_text())
    loaded = load(tmp_path)
    assert manifest["digest"] == weights_digest(converted.model) == weights_digest(loaded.model) == loaded.digest()
    assert load(tmp_path, dtype="bfloat16").digest() == manifest["digest"]
    assert json.loads((tmp_path / "conversion.json").read_text())["digest"] == manifest["digest"]


def test_a_model_of_an_earlier_version_loads_with_one_warning(run, caplog):
    file = run[0] / "model" / "graftwork.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: manifest[key] for key in ("graftwork", "methods", "probe")}))
    with caplog.at_level(logging.WARNING):
        load(run[0])
    assert caplog.text.count("records no digests") == 1


def test_a_finished_training_of_an_earlier_version_stays_finished(run, caplog):
    folder, settings = run
    weights = load_file(folder / "model" / "model.safetensors")
    file = folder / "model" / "graftwork.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: manifest[key] for key in ("graftwork", "methods", "probe")}))
    for name, removed in (("settings.json", "start"), ("finished.json", "digest")):
        record = json.loads((folder / "train" / "distill" / name).read_text())
        record.pop(removed)
        record.pop("sha256")
        (folder / "train" / "distill" / name).write_text(json.dumps(record))
    train(str(folder), settings)
    assert "is finished" in caplog.text
    assert all(weights[name].equal(tensor) for name, tensor in load_file(folder / "model/model.safetensors").items())


def test_a_training_from_other_weights_does_not_take_over_the_finished_one(run):
    folder, settings = run
    model = load(shipped_model("encoder"), dtype="float32", labels=LABELS, seed=5)
    with pytest.raises(ConfigError, match="another start"):
        train(convert(model, Cald(rank=8)), settings, run=folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_saved_on_request_only(tmp_path, value, caplog):
    model = tiny_model("t5", dtype=torch.float32)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = value
    assert non_finite(model) == [name]
    converted = convert(model, TopK(feed_forward_k=6), tokenizer=word_tokenizer())
    with pytest.raises(NonFiniteError, match=name):
        converted.save(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    converted.save(tmp_path / "run", allow_non_finite=True)
    load(tmp_path / "run")
    assert name in caplog.text


def test_the_probe_comparison_fails_on_nan(tmp_path):
    save(convert(tiny_model("t5", dtype=torch.float32), TopK(feed_forward_k=6), tokenizer=word_tokenizer()), tmp_path)
    file = tmp_path / "model" / "graftwork.json"
    manifest = json.loads(file.read_text())
    manifest["probe"]["values"][0] = float("nan")
    manifest.pop("sha256")
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatchError, match="answers a fixed input differently"):
        load(tmp_path)


def test_a_prediction_with_weights_that_are_not_finite_is_refused(run):
    folder, settings = run
    model = load(folder)
    with torch.no_grad():
        model.model.classifier.out_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"classifier\.out_proj\.weight"):
        evaluate(model, list(settings.tasks), settings=EvaluationSettings())


def test_columns_that_are_not_named_leave_the_identity_of_a_training_as_in_earlier_versions():
    plain = training._identity(SimpleNamespace(methods=()), TrainingSettings(), [], 0, None)["train"]
    assert not {entry.name for entry in fields(DataFields)} & set(plain)
    named = training._identity(SimpleNamespace(methods=()), TrainingSettings(input_field="a"), [], 0, None)["train"]
    assert named == {**plain, "input_field": "a"}
