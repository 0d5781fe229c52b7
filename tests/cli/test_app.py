"""The verbs, as a newcomer types them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from graftwork.cli.app import app
from graftwork.demo import shipped_model
from graftwork.pipeline.answers import predict
from graftwork.settings.evaluation import EvaluationSettings

MODEL = shipped_model("encoder_decoder")
TASK = ("--task", "world/facts")
SMALL = ("--limit", "4", "--max-new-tokens", "4")


@pytest.fixture
def own_run(converted_run, tmp_path):
    return Path(shutil.copytree(converted_run, tmp_path / "run"))


def test_help_of_every_verb_says_what_its_options_do(graftwork):
    graftwork()
    for verb in [command.name or command.callback.__name__ for command in app.registered_commands]:
        outcome = graftwork(verb, "--help")
        assert outcome.code == 0
        assert "--" in outcome.out


def test_help_of_convert_shows_the_settings_of_the_method(graftwork):
    assert "--feed-forward-k" in graftwork("convert", "topk", "--help").out


def test_no_word_at_all_shows_the_help(graftwork):
    outcome = graftwork()
    assert outcome.code == 0
    assert "convert" in outcome.out
    assert not outcome.err


def test_help_answers_within_a_second_and_without_torch():
    code = (
        "import sys; from graftwork.cli.app import run; run(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # also fills the byte-code cache
    before = os.times()
    subprocess.run([sys.executable, "-m", "graftwork", "--help"], check=True, capture_output=True)
    after = os.times()
    # processor time, which other work on the machine does not lengthen as it does the clock's
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


@pytest.mark.parametrize("kind", ["methods", "tasks", "mixtures", "families", "recipes"])
def test_list_prints_every_kind_as_text_and_as_json(graftwork, kind):
    assert graftwork("list", kind).code == 0
    assert isinstance(json.loads(graftwork("list", kind, "--json").out), list)


def test_list_can_be_kept_to_what_one_method_brings_along(graftwork):
    # 163 tasks of the paper, and 7 on other data sets
    for kind, count in (("tasks", 170), ("mixtures", 50)):
        names = json.loads(graftwork("list", kind, "--method", "wt5", "--json").out)
        assert len(names) == len(set(names)) == count
    recipes = json.loads(graftwork("list", "recipes", "--method", "wt5", "--json").out)
    assert recipes
    assert all(name.startswith("wt5/") for name in recipes)
    refused = graftwork("list", "tasks", "--method", "topk")
    assert refused.code == 2
    assert "Found no tasks that only topk has" in refused.err
    assert "Found --method beside families" in graftwork("list", "families", "--method", "wt5").err


def test_show_prints_a_card_a_task_its_examples_and_a_recipe(graftwork, data):
    assert "## When not to use it" in graftwork("show", "topk").out
    assert "exact_match" in graftwork("show", "world/facts").out
    assert len(json.loads(graftwork("show", "world/facts", "--data", data, "-n", "2", "--json").out)) == 2
    assert "published:" in graftwork("show", "topk/unifiedqa-t5-base_boolq").out


def test_dry_run_lists_changes_and_writes_nothing(graftwork, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = graftwork("convert", "topk", MODEL, "--feed-forward-k", "8", "--dry-run", "--json")
    assert len(json.loads(outcome.out)) == 4
    assert not list(tmp_path.iterdir())


def test_train_evaluate_report_and_doctor_work_on_one_run(graftwork, own_run, data):
    train = ("train", own_run, "--task", "world/keywords", "--data", data, "--max-steps", "2", "--save-steps", "1")
    outcome = graftwork(*train, "--set", "train.save_total_limit=null", "--per-device-train-batch-size", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)[0]["phase"] == "finetune"

    outcome = graftwork("evaluate", own_run, *TASK, "--data", data, *SMALL, "--baseline", "--json")
    assert [row["setting"] for row in json.loads(outcome.out)] == ["dense", "converted"]

    outcome = graftwork("evaluate", own_run, *TASK, "--data", data, *SMALL, "--checkpoints", "all", "--json")
    assert [row["setting"] for row in json.loads(outcome.out)] == ["step 1", "step 2"]
    outcome = graftwork("evaluate", own_run, *TASK, "--data", data, *SMALL, "--checkpoints", "best", "--json")
    assert len(json.loads(outcome.out)) == 1

    outcome = graftwork("report", own_run, "--json")
    assert [Path(path).exists() for path in json.loads(outcome.out)] == [True, True]
    outcome = graftwork("doctor", own_run, "--json")
    assert outcome.code == 0
    assert {row["state"] for row in json.loads(outcome.out)} <= {"ok", "absent"}


def test_refused_training_leaves_the_record_of_the_run_as_it_was(graftwork, own_run, data):
    before = (own_run / "run.yaml").read_text()
    outcome = graftwork("train", own_run, *TASK, "--data", data, "--set", "train.arguments.no_such=1")
    assert outcome.code == 2
    assert (own_run / "run.yaml").read_text() == before


def test_sweep_over_an_untouched_model_needs_only_the_methods_name(graftwork, data):
    words = ("--set", "method.name=topk", "--over", "method.feed_forward_k=null,8")
    outcome = graftwork("evaluate", MODEL, *TASK, "--data", data, *SMALL, *words, "--json")
    assert [row["setting"] for row in json.loads(outcome.out)] == ["dense", "feed_forward_k=8"]


def test_lowercase_changes_what_the_model_is_asked(graftwork, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"input": "WHO IS IT?", "target": "Owl"}\n')
    outcome = graftwork("predict", MODEL, "--input", questions, "--lowercase", "--json")
    assert json.loads(outcome.out)["input"] == "who is it?"
    words = ("evaluate", MODEL, "--task", questions, "--lowercase", "--max-new-tokens", "2", "-o", tmp_path / "run")
    assert graftwork(*words).code == 0
    prediction = json.loads(next((tmp_path / "run" / "predictions").rglob("*.jsonl")).read_text())
    assert prediction["input"] == "who is it?"
    assert prediction["answers"] == ["owl"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_predict_answers_own_questions(graftwork, tmp_path, suffix):
    questions = tmp_path / f"questions.{suffix}"
    questions.write_text("who?\nwhere?\n" if suffix == "txt" else '{"input": "who?"}\n{"input": "where?"}\n')
    outcome = graftwork("predict", MODEL, "--input", questions, "--max-new-tokens", "2")
    assert [json.loads(line)["input"] for line in outcome.out.splitlines()] == ["who?", "where?"]
    outcome = graftwork(
        "predict", MODEL, "--input", questions, "-o", tmp_path / "answers.jsonl", "--max-new-tokens", "2"
    )
    assert outcome.out == ""
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_predict_never_writes_over_a_file_of_the_user(graftwork, tmp_path):
    questions, notes = tmp_path / "questions.jsonl", tmp_path / "notes.jsonl"
    for file in (questions, notes):
        file.write_text('{"input": "who?"}\n')
    assert graftwork("predict", MODEL, "--input", questions, "-o", questions).code == 2
    assert graftwork("predict", MODEL, "--input", questions, "-o", notes).code == 2
    assert notes.read_text() == '{"input": "who?"}\n'


def test_a_recipe_runs_whole_and_again_from_its_run_folder(graftwork, tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": MODEL,
        "method": {"name": "topk"},
        "evaluate": {"tasks": ["world/facts"], "limit": 4, "max_new_tokens": 4},
        "over": {"method.feed_forward_k": [None, 8]},
        "published": [
            {
                "task": "world/facts",
                "metric": "f1",
                "value": 100.0,
                "tolerance": 100.0,
                "source": "here",
                "at": {"method.feed_forward_k": 8},
            }
        ],
    }
    Path("small.yaml").write_text(yaml.safe_dump(recipe))
    first = graftwork("run", "small.yaml", "--data", data, "--json")
    assert first.code == 0, first.err
    assert "reproduced" in Path("runs/small/report.md").read_text()
    again = graftwork("run", "runs/small", "--json")
    assert again.out == first.out
    assert graftwork("run", "runs/small/run.yaml", "--json").out == first.out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["small"]
    # a run that only evaluates has no model of its own, and nothing is wrong with that
    assert graftwork("doctor", "runs/small").code == 0


def test_flags_beat_assignments_which_beat_the_file(graftwork, own_run, data, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("train: {max_steps: 7, learning_rate: 0.1, save_steps: 1000}\n")
    words = ("--config", file, "--set", "train.learning_rate=1e-3", "--set", "train.max_steps=5", "--max-steps", "1")
    assert graftwork("train", own_run, *TASK, "--data", data, *words, "--set", "train.take=4").code == 0
    recorded = yaml.safe_load((own_run / "run.yaml").read_text())["train"]
    assert (recorded["max_steps"], recorded["learning_rate"], recorded["save_steps"]) == (1, 1e-3, 1000)


def test_prepared_files_are_tasks(graftwork, data, tmp_path):
    outcome = graftwork("prepare", "facts", "-i", data, "-o", tmp_path, "--format", "t5", "--tokenizer", MODEL)
    assert outcome.code == 0, outcome.err
    outcome = graftwork("evaluate", MODEL, "--task", tmp_path / "combined_dev_t5.jsonl", *SMALL, "--json")
    assert json.loads(outcome.out)[0]["size"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", pytest.param("evaluate", marks=pytest.mark.long)])
def test_interrupted_work_goes_on_with_the_same_command(graftwork, own_run, data, verb):
    if verb == "train":
        words = ["train", str(own_run), *TASK, "--data", str(data), "--max-steps", "12", "--save-steps", "1"]
        words += ["--per-device-train-batch-size", "1", "--logging-steps", "1"]
        sign = "train/finetune/checkpoint-*/trainer_state.json"
    else:
        words = ["evaluate", str(own_run), *TASK, "--data", str(data), "--batch-size", "1", "--limit", "200"]
        words += ["--num-beams", "8"]  # slow enough to be stopped in time on a busy machine
        sign = "predictions/world/*.converted.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "graftwork", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        # a suite that runs in the background of a shell has interrupts ignored, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(own_run.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "Interrupted. Run the same command again to resume."
    assert "Traceback" not in err
    assert out == ""
    outcome = graftwork(*words, "--json")
    assert outcome.code == 0, outcome.err
    if verb == "train":
        steps = [json.loads(line)["step"] for line in (own_run / "train/finetune/log.jsonl").read_text().splitlines()]
        assert steps[:12] == list(range(1, 13))
    else:
        assert json.loads(outcome.out)[0]["size"] == 200


def on_stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def test_predict_prints_the_answers_to_texts_alone(graftwork, monkeypatch):
    texts = ["what is the pet of gavis rairtow?", "where does tasow baino live?"]
    expected = [row["prediction"] for row in predict(MODEL, texts)]
    assert len(set(expected)) == 2
    assert graftwork("predict", MODEL, *texts) == (0, "".join(f"{text}\n" for text in expected), "")
    assert graftwork("predict", texts[0], "--num-beams", "1", MODEL).code == 2  # the first word is the model
    # the encoding of the locale is not that of the text
    on_stdin(monkeypatch, f"\ufeff{texts[0]}\r\n\n{texts[1]} é".encode())
    piped = graftwork("predict", MODEL, "-", "--json")
    assert [json.loads(line)["input"] for line in piped.out.splitlines()] == [texts[0], f"{texts[1]} é"]
    on_stdin(monkeypatch, texts[1].encode())
    assert graftwork("predict", "--input", "-", MODEL).out == f"{expected[1]}\n"
    on_stdin(monkeypatch, b"\xff\xfe")
    assert "stdin is not UTF-8 (byte 0)" in graftwork("predict", MODEL, "-").err


def test_several_answers_are_one_line_each(graftwork, monkeypatch):
    monkeypatch.setattr("graftwork.cli.verbs.predict", lambda *words, **options: [{"prediction": "a\nb\x1b"}] * 2)
    assert graftwork("predict", MODEL, "one", "two").out == "a\\nb\\x1b\na\\nb\\x1b\n"
    monkeypatch.setattr("graftwork.cli.verbs.predict", lambda *words, **options: [{"prediction": "a\nb"}])
    assert graftwork("predict", MODEL, "one").out == "a\nb\n"


def test_the_template_and_lower_case_apply_to_texts_and_files_alike(graftwork, tmp_path):
    file = tmp_path / "reviews.txt"
    file.write_text("A Great film\n")
    words = ("--prompt", "movie_rationales_eval_v010", "--explain", "--lowercase", "--json")
    asked = json.loads(graftwork("predict", MODEL, "A Great film", *words).out)["input"]
    assert asked == json.loads(graftwork("predict", MODEL, "--input", file, *words).out)["input"]
    assert asked.startswith("explain ")
    assert asked.endswith("a great film")
    rows = predict(MODEL, ["A Great film", ""], EvaluationSettings(prompt=words[1], explain=True, lowercase=True))
    assert [row["input"] for row in rows][:1] == [asked]
    assert len(rows) == 2
