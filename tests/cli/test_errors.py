"""Wrong input is answered by one line that says what to do, and by an exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from graftwork.demo import shipped_model

MODEL = shipped_model("encoder_decoder")
EVALUATE = ("evaluate", MODEL, "--task", "world/facts")
CONVERT = ("convert", "topk", MODEL, "-o", "out")
TRAIN = ("train", "run", "--task", "world/facts")

WRONG = {
    "unknown method": (("convert", "topkk", MODEL, "-o", "out"), 2, "Did you mean 'topk'?"),
    "k of zero": ((*CONVERT, "--feed-forward-k", "0"), 2, "leave it out or set it to null"),
    "negative k": ((*CONVERT, "--attention-k", "-1"), 2, "attention_k is -1"),
    "share above one": ((*CONVERT, "--feed-forward-k", "1.5"), 2, "feed_forward_k is 1.5"),
    "word for a number": ((*CONVERT, "--feed-forward-k", "many"), 2, "'many'"),
    "nothing to change": (CONVERT, 2, "would change nothing"),
    "no such layer": ((*CONVERT, "--feed-forward-k", "4", "--layers", "9"), 2, "layers 9"),
    "no run folder": (("convert", "topk", MODEL, "--feed-forward-k", "4"), 2, "-o"),
    "file in the place of a folder": (("convert", "topk", MODEL, "-o", "a.txt", "--feed-forward-k", "4"), 2, "a.txt"),
    "missing model folder": (("convert", "topk", "./nowhere", "-o", "out", "--feed-forward-k", "4"), None, "nowhere"),
    "missing model": (("evaluate", "nowhere/model", "--task", "world/facts"), 2, "nowhere/model"),
    "typo of a run": (("predict", "./rnu", "who?"), 2, "Did you mean run?"),
    "typo of a run without ./": (("predict", "rnu", "who?"), 2, "Did you mean run?"),
    "typo in a folder of runs": (("predict", "runs/frist", "who?"), 2, "Did you mean runs/first?"),
    "typo of the folder of runs": (("train", "rusn/first", "--task", "world/facts"), 1, "Did you mean runs/first?"),
    "no such run in a folder of runs": (("evaluate", "runs/zz", "--task", "world/facts"), 2, "in runs: first, second."),
    "typo of a run in a report": (("report", "./rnu"), 1, "Did you mean run?"),
    "typo of a run in doctor": (("doctor", "rnu"), 1, "Did you mean run?"),
    "unsupported family": (("convert", "topk", "deberta", "-o", "out", "--attention-k", "4"), 2, "attention interface"),
    "unknown verb": (("convrt",), 2, "convrt"),
    "unknown option": ((*EVALUATE, "--batchsize", "2"), 2, "--batch-size"),
    "missing argument": (("convert", "topk"), 2, "model"),
    "no input": (("predict", MODEL), 2, "--input"),
    "text beside a file": (("predict", MODEL, "who?", "--input", "a.txt"), 2, "'who?' and --input a.txt"),
    "stdin beside a text": (("predict", MODEL, "-", "who?"), 2, "- for stdin"),
    "empty text": (("predict", MODEL, " "), 2, "empty text"),
    "text for several fields": (
        ("predict", MODEL, "who?", "--prompt", "esnli_v010"),
        1,
        "several fields",
    ),
    "temperature of zero": (("predict", MODEL, "who?", "--temperature", "0"), 2, "leave it out"),
    "share of tokens above one": (("predict", MODEL, "who?", "--top-p", "1.5"), 2, "top_p is 1.5"),
    "no tokens to sample from": (("predict", MODEL, "who?", "--top-k", "0"), 2, "top_k is 0"),
    "seed of greedy search": (("predict", MODEL, "who?", "--seed", "3"), 2, "no effect on greedy search"),
    "beams and sampling": (("predict", MODEL, "who?", "--num-beams", "2", "--top-k", "3"), 2, "does not sample"),
    "unknown section": ((*EVALUATE, "--set", "evaluation.limit=4"), 2, "section method or evaluate"),
    "unknown setting": ((*EVALUATE, "--set", "evaluate.batchsize=4"), 2, "Did you mean 'batch_size'?"),
    "assignment without value": ((*EVALUATE, "--set", "evaluate.limit"), 2, "section.key=value"),
    "sweep over an unknown setting": (
        ("evaluate", "run", "--task", "world/facts", "--over", "method.feed_k=1"),
        2,
        "Did you mean 'feed_forward_k'?",
    ),
    "sweep without a method": ((*EVALUATE, "--over", "method.feed_forward_k=1"), 2, "--set method.name=topk"),
    "unknown task": (("evaluate", MODEL, "--task", "world/fact"), 2, "Did you mean 'world/facts'?"),
    "no task": (("evaluate", MODEL), 2, "list tasks"),
    "missing data folder": ((*EVALUATE, "--data", "nowhere"), 1, "nowhere"),
    "missing split": ((*EVALUATE, "--split", "devv"), 1, "devv"),
    "missing file": (("evaluate", MODEL, "--task", "nowhere.jsonl"), 1, "nowhere.jsonl"),
    "broken line": (("evaluate", MODEL, "--task", "broken.jsonl"), 1, "broken.jsonl, line 2"),
    "broken line in questions": (("predict", MODEL, "--input", "broken.jsonl"), 1, "broken.jsonl, line 2"),
    "limit of zero": ((*EVALUATE, "--limit", "0"), 2, "limit is 0"),
    "steps of zero": ((*TRAIN, "--max-steps", "0"), 2, "max_steps is 0"),
    "nothing to train on": (("train", "run"), 2, "no task to train on"),
    "training a folder that is no run": (("train", MODEL, "--task", "world/facts"), 1, "graftwork convert"),
    "checkpoints where there are none": (
        ("evaluate", "run", "--task", "world/facts", "--checkpoints", "all"),
        1,
        "no checkpoint",
    ),
    "unknown choice of checkpoints": (
        ("evaluate", "run", "--task", "world/facts", "--checkpoints", "some"),
        2,
        "all, last or best",
    ),
    "unknown key in a recipe": (("run", "typo.yaml"), 2, "Did you mean 'method'?"),
    "unknown key below": (("run", "typo_below.yaml"), 2, "Did you mean 'batch_size'?"),
    "no YAML": (("run", "no.yaml"), 2, "no.yaml, line"),
    "missing recipe file": (("run", "nowhere.yaml"), 2, "does not exist"),
    "unknown recipe": (("run", "topk/unifiedqa-t5-base_bool"), 2, "Did you mean"),
    "recipe sweep over an unknown setting": (("run", "good.yaml", "--over", "method.feed_k=1,2"), 2, "feed_k"),
    "folder without results": (("report", "run"), 1, "results.json"),
    "unknown format": (("report", "run", "--format", "pdf"), 2, "md, html or eraser"),
    "unknown kind": (("list", "thing"), 2, "methods"),
    "unknown name": (("show", "topkk"), 2, "Did you mean 'topk'?"),
    "unknown data set": (("prepare", "boolqq", "-i", "data", "-o", "out"), 1, "boolqq"),
    "doctor of no folder": (("doctor", "nowhere"), 1, "nowhere"),
    "doctor on no device": (
        ("doctor", "run", "--device", "xla:7"),
        2,
        "which this machine does not have",
    ),
}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, converted_run, data):
    """A folder with a run, with data, and with everything that can be wrong."""
    from transformers import DebertaV2Config, DebertaV2Model

    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(converted_run, folder / "run")
    for name in ("first", "second"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "run.yaml").touch()
    (folder / "data").symlink_to(data)
    (folder / "facts").symlink_to(data / "facts")
    (folder / "a.txt").write_text("text")
    (folder / "broken.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": \n')
    recipe = {"model": MODEL, "method": {"name": "topk", "feed_forward_k": 4}, "evaluate": {"tasks": ["world/facts"]}}
    (folder / "good.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "typo.yaml").write_text(yaml.safe_dump({"model": MODEL, "metod": {"name": "topk"}}))
    (folder / "typo_below.yaml").write_text(yaml.safe_dump({"model": MODEL, "evaluate": {"batchsize": 2}}))
    (folder / "no.yaml").write_text("model: [\n")
    config = DebertaV2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64
    )
    DebertaV2Model(config).save_pretrained(folder / "deberta")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL) / name, folder / "deberta")
    return folder


def assert_one_line(outcome, *parts):
    assert outcome.out == ""
    told = [line for line in outcome.err.splitlines() if " cut after " not in line]
    assert len(told) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_by_one_line(graftwork, workplace, monkeypatch, case):
    words, code, part = WRONG[case]
    monkeypatch.chdir(workplace)
    outcome = graftwork(*words)
    assert outcome.code == code or (code is None and outcome.code in (1, 2))
    assert_one_line(outcome, part)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])


HALF = {
    "only run.yaml": (
        lambda run: [shutil.rmtree(run / "model"), (run / "conversion.json").unlink()],
        "graftwork convert",
    ),
    "model missing": (lambda run: shutil.rmtree(run / "model"), "holds no model"),
    "manifest truncated": (lambda run: truncate(run / "model" / "graftwork.json"), "graftwork.json"),
    "configuration truncated": (lambda run: truncate(run / "model" / "config.json"), "config.json"),
    "weights truncated": (lambda run: truncate(run / "model" / "model.safetensors"), ""),
    "weights missing": (lambda run: (run / "model" / "model.safetensors").unlink(), "model.safetensors"),
    "run.yaml truncated": (lambda run: (run / "run.yaml").write_text("model: ["), "run.yaml, line"),
    "results truncated": (lambda run: (run / "results.json").write_text('{"model": "x", "ro'), "results.json"),
}


@pytest.mark.parametrize("case", HALF)
def test_half_a_run_is_answered_by_one_line(graftwork, converted_run, data, tmp_path, case):
    spoil, part = HALF[case]
    run = Path(shutil.copytree(converted_run, tmp_path / "run"))
    spoil(run)
    outcome = graftwork(
        "evaluate", run, "--task", "world/facts", "--data", data, "--limit", "2", "--max-new-tokens", "1"
    )
    assert outcome.code in (1, 2)
    assert_one_line(outcome, part)


@pytest.mark.parametrize("case", [*HALF, "conversion.json missing", "conversion.json truncated"])
def test_doctor_finds_what_is_wrong_with_half_a_run(graftwork, converted_run, tmp_path, case):
    run = Path(shutil.copytree(converted_run, tmp_path / "run"))
    if case == "conversion.json missing":
        (run / "conversion.json").unlink()
    elif case == "conversion.json truncated":
        truncate(run / "conversion.json")
    else:
        HALF[case][0](run)
    outcome = graftwork("doctor", run, "--json")
    assert outcome.code == 1
    assert outcome.err == ""
    assert "wrong" in {row["state"] for row in json.loads(outcome.out)}


def test_debug_shows_the_error_itself(graftwork):
    with pytest.raises(LookupError, match="topkk"):
        graftwork("--debug", "convert", "topkk", MODEL)


def test_an_error_that_nobody_foresaw_is_one_line_too(graftwork, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("graftwork.cli.catalogue.names", fail)
    outcome = graftwork("list")
    assert outcome.code == 1
    assert_one_line(outcome, "ZeroDivisionError: division by zero", "--debug")


def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(graftwork, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *words, **options: pytest.fail("looked"))
    outcome = graftwork("convert", "topk", tmp_path / "nowhere", "-o", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "there is no such folder" in outcome.err
