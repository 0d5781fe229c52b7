"""Files of a run besides its weights are what they were when they were written; changed ones are refused."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from graftwork.core.files import append_record, read_json, read_lines, write_record, write_records
from graftwork.core.run_folder import RunFolder
from graftwork.errors import (
    CheckpointMismatchError,
    ConfigError,
    DataError,
    DiskFullError,
    IncompleteRunError,
    NonFiniteError,
)
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.topk import TopK
from graftwork.metrics.results import Results, update_results
from graftwork.pipeline.contents import check_contents
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import evaluate_checkpoints
from graftwork.pipeline.training import train
from graftwork.reporting.render import report
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import load_recipe
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.finiteness import non_finite
from graftwork.tasks.prepare import load_prepared, prepare
from graftwork.training.checkpoints import last_checkpoint
from tiny_models import tiny_model, word_tokenizer

ANSWERS = EvaluationSettings(max_new_tokens=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained and evaluated run, and the settings of its training."""
    folder = tmp_path_factory.mktemp("contents")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"input": f"w{n + 4} w{n}", "target": f"w{n % 4 + 6}"}) + "\n" for n in range(8))
    )
    save(
        convert(tiny_model("t5", dtype=torch.float32), TopK(feed_forward_k=6), tokenizer=word_tokenizer()),
        folder / "run",
    )
    settings = TrainingSettings(
        tasks=(str(rows),),
        max_steps=4,
        save_steps=2,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=4,
    )
    train(str(folder / "run"), settings)
    evaluate(folder / "run", [str(rows)], settings=ANSWERS)
    return folder / "run", settings


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def change(path, before, after):
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))


def finding(run, check, **options):
    return next(entry for entry in check_contents(RunFolder(run), **options) if entry[0] == check)


def test_a_record_carries_its_own_digest(tmp_path):
    file = tmp_path / "record.json"
    write_record(file, {"a": 1, "b": [0.1, float("nan")], "c": {1: "ä"}})
    assert read_json(file) == {"a": 1, "b": [0.1, None], "c": {"1": "ä"}}
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    assert read_json(file)["a"] == 1
    change(file, b'"a": 1', b'"a": 2')
    with pytest.raises(CheckpointMismatchError, match="has changed since it was written"):
        read_json(file)


@pytest.mark.parametrize("damage", ["value", "digest removed", "line feed"])
def test_a_changed_line_is_refused_and_a_torn_one_is_skipped(tmp_path, damage):
    file = tmp_path / "lines.jsonl"
    write_records(file, [{"n": 1}, {"n": 2}])
    append_record(file, {"n": 3})
    whole = file.read_bytes()
    assert [row["n"] for row in read_lines(file)] == [1, 2, 3]
    file.write_bytes(whole[:-4])
    assert [row["n"] for row in read_lines(file)] == [1, 2]
    lines = whole.splitlines()
    if damage == "value":
        file.write_bytes(whole.replace(b'"n": 2', b'"n": 7'))
    elif damage == "digest removed":
        file.write_bytes(b"\n".join([lines[0], b'{"n": 2}', lines[2], b""]))
    else:
        file.write_bytes(whole[:-1] + b"*")
    with pytest.raises(DataError, match=r"line [23]: "):
        list(read_lines(file))


def test_values_changed_by_hand_are_noticed_and_comments_are_free(run):
    file = run / "run.yaml"
    recorded = load_recipe(run)
    file.write_text("# a remark\n" + file.read_text())
    assert load_recipe(run) == recorded
    written = file.read_text()
    for before, after in (("notes: []", "notes: [mine]"), ("python: 3", "python: 2")):
        assert before in written
        file.write_text(written.replace(before, after))
        with pytest.raises(CheckpointMismatchError, match=r"run\.yaml has changed since the run wrote it"):
            load_recipe(run)
    file.write_text(written)
    change(file, b"max_steps: 4", b"max_steps: 5")
    for use in (lambda: load_recipe(file), lambda: report([run]), lambda: train(str(run), recorded.train)):
        with pytest.raises(CheckpointMismatchError, match=r"run\.yaml has changed since the run wrote it"):
            use()
    copy = run.parent / "mine.yaml"
    shutil.copy(file, copy)
    assert load_recipe(copy).train.max_steps == 5


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("results.json", b'"size": 8', b'"size": 9'),
        ("conversion.json", b'"after"', b'"efter"'),
        ("train/finetune/settings.json", b'"seed": 0', b'"seed": 1'),
    ],
)
def test_a_changed_record_of_a_run_is_refused(run, finished, name, before, after):
    change(run / name, before, after)
    with pytest.raises(CheckpointMismatchError, match="has changed since it was written"):
        report([run]) if "train" not in name else train(str(run), finished[1])


def test_changed_predictions_are_refused_by_evaluate_and_doctor(run, finished):
    assert finding(run, "logs and predictions")[1] == "ok"
    predicted = next((run / "predictions").glob("*.jsonl"))
    change(predicted, b'"prediction": "', b'"prediction": "w9 ')
    with pytest.raises(DataError, match="line 1: changed since it was written"):
        evaluate(run, list(finished[1].tasks), settings=ANSWERS)
    assert finding(run, "logs and predictions")[1] == "wrong"


def test_a_changed_checkpoint_is_not_resumed_and_not_scored(run, finished):
    newest = run / "train" / "finetune" / "checkpoint-4"
    assert last_checkpoint(newest.parent) == newest
    assert finding(run, "checkpoints", deep=True)[1] == "ok"
    # a byte inside a tensor, which neither sizes nor loaders show
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    assert last_checkpoint(newest.parent).name == "checkpoint-2"
    assert finding(run, "checkpoints", deep=True)[1] == "wrong"
    with pytest.raises(CheckpointMismatchError, match="checkpoint-4 is damaged"):
        evaluate_checkpoints(run, "last", replace(ANSWERS, tasks=finished[1].tasks))
    assert evaluate_checkpoints(run, "2", replace(ANSWERS, tasks=finished[1].tasks)).rows[0].own is False


def test_a_checkpoint_of_an_earlier_version_is_resumed(run):
    newest = run / "train" / "finetune" / "checkpoint-4"
    (newest / "digests.json").unlink()
    assert last_checkpoint(newest.parent) == newest


def test_rows_of_earlier_weights_are_left_out_of_the_report(run, finished, caplog):
    folder = RunFolder(run)

    def older(results):
        row = results.rows[0]
        stale = replace(row, label="feed_forward_k=3", digest="0" * 64)
        other = replace(stale, label="step 2", own=False)
        unknown = replace(stale, label="imported", own=None)
        return replace(results, rows=(row, stale, other, unknown), changes={"feed_forward_k=3": 2})

    update_results(folder, older)
    report([run])
    text = (run / "report.md").read_text()
    assert "feed_forward_k=3" not in text
    assert "| step 2 |" in text
    assert "Measured on other weights than those in model/: step 2, imported." in text
    assert caplog.text.count("have changed since: feed_forward_k=3") == 1
    update_results(folder, lambda results: replace(results, rows=results.rows[1:2]))
    with pytest.raises(IncompleteRunError, match="graftwork evaluate"):
        report([run])


def test_prepared_files_are_compared_with_their_checksum(tmp_path):
    source = tmp_path / "raw" / "squad1_1"
    source.mkdir(parents=True)
    (source / "dev.tsv").write_text("who is 1? \\n about 1\tname 1\n")
    made = prepare(["squad1_1"], input=tmp_path / "raw", output=tmp_path)
    checksum = tmp_path / f"{made.path.name}.sha256"
    assert checksum.read_text().split()[1] == made.path.name
    assert load_prepared(made.path)[0].rows[0].target == "name 1"
    change(made.path, b"name 1", b"name 2")
    with pytest.raises(DataError, match=r"SHA-256 differs .* or remove combined_dev_unifiedqa\.jsonl\.sha256"):
        load_prepared(made.path)
    checksum.unlink()
    assert load_prepared(made.path)[0].rows[0].target == "name 2"


def test_buffers_that_are_not_finite_are_refused_like_parameters(tmp_path, caplog):
    converted = convert(tiny_model("t5", dtype=torch.float32), TopK(feed_forward_k=6), tokenizer=word_tokenizer())
    inner = converted.model.encoder
    inner.register_buffer("statistics", torch.tensor([1.0, float("nan")]))
    inner.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    inner.register_buffer("absent", torch.tensor([torch.nan]))
    inner.non_finite_marks = frozenset({"absent"})
    assert non_finite(converted.model) == ["encoder.statistics"]
    with pytest.raises(NonFiniteError, match=r"encoder\.statistics contain NaN"):
        converted.save(tmp_path / "run")
    from graftwork.pipeline.answers import predict

    with pytest.raises(NonFiniteError, match=r"predict with this model: encoder\.statistics"):
        predict(converted, ["w4"], ANSWERS)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_one_step_with_an_absurd_learning_rate_writes_no_model(finished, tmp_path, optim):
    folder, settings = finished
    save(load(folder), tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    one = replace(settings, max_steps=1, save_steps=500, learning_rate=1e30, optim=optim, lr_scheduler_type="constant")
    with pytest.raises(NonFiniteError, match=r"above 1e\+18 at step 1"):
        train(str(tmp_path / "run"), one)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "train" / "finetune" / "finished.json").exists()


def test_a_loss_that_is_not_finite_after_the_last_step_writes_no_model(finished, tmp_path, monkeypatch):
    folder, settings = finished
    save(load(folder), tmp_path / "run")
    from graftwork.training.phases import Finetune

    monkeypatch.setattr(Finetune, "validate", lambda *given: {"loss": torch.tensor(torch.inf)})
    with pytest.raises(NonFiniteError, match=r"The loss is inf at step 2"):
        train(str(tmp_path / "run"), replace(settings, max_steps=1, save_steps=500))
    assert not (tmp_path / "run" / "train" / "finetune" / "finished.json").exists()


def test_a_full_disk_below_tensorboard_is_one_error_without_a_traceback(finished, tmp_path, monkeypatch, capfd):
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder, settings = finished
    save(load(folder), tmp_path / "run")
    own, calls = RecordWriter.write, []

    def write(self, data):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    hook = threading.excepthook
    with pytest.raises(DiskFullError):
        train(str(tmp_path / "run"), settings)
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_random_weights_are_refused_where_a_folder_has_weights(finished, tmp_path):
    model = finished[0] / "model"
    with pytest.raises(ConfigError, match="which has weights, so it would have no effect"):
        load(model, random_weights=True)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors", "graftwork.json"))
    assert evaluate(load(bare, random_weights=True), list(finished[1].tasks), settings=ANSWERS).rows
    with pytest.raises(ConfigError, match="--random-weights of convert, evaluate or predict"):
        load(bare)


def test_what_a_phase_wrote_is_compared_with_the_manifest(finished, tmp_path, monkeypatch):
    from graftwork.training.phases import Finetune

    save(load(finished[0]), tmp_path / "run")

    def finish(self, model, folder):
        write_record(folder / "step_sizes.json", {"layer": [0.5, 1.0, 2.0]})

    monkeypatch.setattr(Finetune, "finish", finish)
    train(str(tmp_path / "run"), finished[1])
    manifest = read_json(tmp_path / "run" / "model" / "graftwork.json")
    assert set(manifest["training"]["artifacts"]) == {"train/finetune/step_sizes.json"}
    assert all(state == "ok" for _, state, _ in check_contents(RunFolder(tmp_path / "run"), deep=True))
    change(tmp_path / "run" / "train" / "finetune" / "step_sizes.json", b"0.5", b"0.6")
    assert finding(tmp_path / "run", "artifacts")[1] == "wrong"


def test_results_written_by_an_earlier_version_are_read(run):
    file = run / "results.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    for row in content["rows"]:
        del row["own"]
    file.write_text(json.dumps(content))
    assert Results.read(file).rows[0].own is None
    report([run])
