"""Evaluation and prediction in several processes equal those of one, also after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from graftwork.demo import shipped_model
from graftwork.evaluation.answer_file import part_file

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
