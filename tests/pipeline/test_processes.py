"""Evaluation and prediction in several processes equal those of one, also after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from graftwork.cli.app import run as main
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.evaluation.answer_file import part_file
from graftwork.grafting.converted import Converted
from graftwork.pipeline.loading import load
from graftwork.pipeline.workers import answering_pool
from graftwork.settings.evaluation import EvaluationSettings

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "graftwork")


def run(*words, several=False, rc=0):
    command = [sys.executable, *(TORCHRUN if several else ("-m", "graftwork")), *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == rc, done.stderr
    return done


def lines(path):
    return sorted(path.read_bytes().split(b"\n"))


@pytest.mark.long
def test_two_processes_predict_what_one_does(tmp_path):
    inputs = tmp_path / "in.txt"
    inputs.write_text("".join(f"what is the pet of number {n} {'and so on ' * (n % 5)}?\n" for n in range(50)))
    words = ("predict", shipped_model("encoder_decoder"), "--input", inputs, "--set", "evaluate.batch_size=4")
    run(*words, "-o", tmp_path / "one.jsonl")
    run(*words, "-o", tmp_path / "two.jsonl", several=True)
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")
    # a call that was killed left some answers in the file and some with a process
    whole = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_bytes(b"".join(whole[:9]))
    part_file(tmp_path / "two.jsonl", 1).write_bytes(b"".join(whole[9:20]) + whole[20][:30])
    settings = part_file(tmp_path / "two.jsonl", 1).with_suffix(".settings.json")
    settings.write_bytes((tmp_path / "two.settings.json").read_bytes())
    done = run(*words, "-o", tmp_path / "two.jsonl", several=True)
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")
    assert done.stderr.count("Wrote") == 1
    assert not list(tmp_path.glob(".two.process*"))
    # without a file, the first process prints the answers of all
    printed = run(*words, "--json", several=True).stdout
    assert printed == run(*words, "--json").stdout


@pytest.mark.long
def test_two_processes_score_what_one_does(tmp_path, cached_world):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"what {n}?", "target": "a dog"}) + "\n" for n in range(30)))
    run("convert", "topk", shipped_model("encoder_decoder"), "--feed-forward-k", "16", "-o", tmp_path / "run")
    words = ("evaluate", tmp_path / "run", "--task", rows, "--baseline", "--set", "evaluate.batch_size=4")
    run(*words, "-o", tmp_path / "one")
    run(*words, "-o", tmp_path / "two", several=True)
    kept = ("task", "label", "scores", "size", "digest")
    scores = [
        [
            {name: row[name] for name in kept}
            for row in json.loads((tmp_path / name / "results.json").read_text())["rows"]
        ]
        for name in ("one", "two")
    ]
    assert scores[0] == scores[1]
    for path in (tmp_path / "one" / "predictions").glob("*.jsonl"):
        assert lines(tmp_path / "two" / "predictions" / path.name) == lines(path)


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or (os.cpu_count() or 1) < 2,
    reason="needs Ray (pip install 'graftwork[ray]') and two CPUs",
)


@needs_ray
@pytest.mark.long
def test_ray_workers_predict_what_one_process_does_also_after_a_kill(tmp_path):
    inputs = tmp_path / "in.txt"
    inputs.write_text("".join(f"what is the pet of number {n} {'and so on ' * (n % 5)}?\n" for n in range(400)))
    run("convert", "topk", shipped_model("encoder_decoder"), "--feed-forward-k", "16", "-o", tmp_path / "run")
    words = ("predict", tmp_path / "run", "--input", inputs, "--set", "evaluate.batch_size=4")
    run(*words, "-o", tmp_path / "one.jsonl")
    command = [sys.executable, "-m", "graftwork", *map(str, words), "-o", str(tmp_path / "two.jsonl"), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        answers, killed = tmp_path / "two.jsonl", None
        while running.poll() is None and killed is None:
            time.sleep(0.05)
            if answers.exists() and answers.read_bytes().count(b"\n") > 20:
                below = psutil.Process(running.pid).children(recursive=True)
                killed = next(each for each in below if "AnsweringActor" in " ".join(each.cmdline()))
                killed.kill()
        _, error = running.communicate(timeout=280)
    assert killed is not None
    assert running.returncode == 0, error
    assert lines(answers) == lines(tmp_path / "one.jsonl")


@needs_ray
@pytest.mark.long
def test_ray_workers_score_both_models_as_one_process_does(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"what {n}?", "target": "a dog"}) + "\n" for n in range(30)))
    run("convert", "topk", shipped_model("encoder_decoder"), "--feed-forward-k", "16", "-o", tmp_path / "run")
    words = ("evaluate", tmp_path / "run", "--task", rows, "--baseline", "--set", "evaluate.batch_size=4")
    run(*words, "-o", tmp_path / "one")
    run(*words, "-o", tmp_path / "two", "--workers", "2")
    for path in (tmp_path / "one" / "predictions").glob("*.jsonl"):
        assert lines(tmp_path / "two" / "predictions" / path.name) == lines(path)
    labels = [row["label"] for row in json.loads((tmp_path / "two" / "results.json").read_text())["rows"]]
    assert sorted(labels) == ["converted", "dense"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "0"), "workers is 0"),
        (("--gpus-per-worker", "1"), "gpus_per_worker is 1"),
    ],
)
def test_workers_without_effect_are_refused(words, message, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    words = ["predict", str(shipped_model("encoder_decoder")), "--input", str(tmp_path / "in.txt"), *words]
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_workers_need_a_checkpoint():
    converted = load(shipped_model("encoder_decoder"))
    settings = EvaluationSettings(workers=1)
    with pytest.raises(ConfigError, match="Save the model to a run"):
        answering_pool(replace(converted, origin=None), [], settings)


def test_workers_of_a_process_of_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one of 2 processes of torchrun"):
        answering_pool(Converted(None), [], EvaluationSettings(workers=1))
