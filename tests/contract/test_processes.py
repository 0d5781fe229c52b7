"""Every stage of every method: two processes lead to the outcome of one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graftwork.cli.app import run as command
from graftwork.core.run_folder import DETAILS_SUFFIX
from graftwork.methods import NAMES
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from regrad_toy import examples, prompt_file, toy_model, toy_tokenizer
from tiny_models import VOCABULARY, tiny_model, word_tokenizer

PROGRAM = Path(__file__).with_name("stages.py")


def sentence(number: int, words: int = 8) -> str:
    return " ".join(f"w{4 + (7 * number + 5 * place) % (VOCABULARY - 4)}" for place in range(words))


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny(folder: Path, family: str) -> Path:
    # every process draws its own dropout
    without = {"t5": "dropout_rate", "llama": "attention_dropout"}[family]
    tiny_model(family, dtype=torch.float32, **{without: 0.0}).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Stages:
    """Commands of one method; `RUN` is the run folder, `OUT` a folder of the outcome."""

    convert: list[str]
    train: list[str]
    later: list[list[str]]
    """Commands on the trained run, each of which may run in several processes."""
    trains: bool = True
    """False if only what is collected from the model is fitted, after one pass over the data."""


def pairs(folder: Path) -> Path:
    return write_lines(
        folder / "rows.jsonl", [{"input": sentence(n, 4 + n % 5), "target": f"w{5 + n % 9}"} for n in range(16)]
    )


def answering(rows: Path) -> list[list[str]]:
    sizes = ["--set", "evaluate.batch_size=4", "--set", "evaluate.max_new_tokens=4"]
    inputs = rows.with_name("inputs.txt")
    inputs.write_text("".join(sentence(n, 3 + n % 7) + "\n" for n in range(18)), encoding="utf-8")
    return [
        ["evaluate", "RUN", "--task", str(rows), "-o", "OUT/scores", *sizes],
        ["predict", "RUN", "--input", str(inputs), "-o", "OUT/answers.jsonl", *sizes],
    ]


def topk(folder: Path) -> Stages:
    rows = pairs(folder)
    flags = ["--attention-k", "2", "--feed-forward-k", "5"]
    return Stages(["topk", str(tiny(folder / "base", "t5")), *flags], ["--task", str(rows)], answering(rows))


def cald(folder: Path) -> Stages:
    rows = pairs(folder)
    flags = ["--mixer", "linear", "--window", "4", "--guide", "unguided"]
    return Stages(["cald", str(tiny(folder / "base", "llama")), *flags], ["--task", str(rows)], answering(rows))


def wt5(folder: Path) -> Stages:
    lines = [
        {"text": sentence(n), "label": ("w10", "w11")[n % 2], "why": sentence(n).split()[n % 8]} for n in range(16)
    ]
    rows = write_lines(folder / "rows.jsonl", lines)
    fields = ["--text-field", "text", "--label-field", "label", "--explanation-field", "why"]
    task = ["--task", str(rows), *fields]
    sizes = ["--set", "evaluate.batch_size=4", "--set", "evaluate.max_new_tokens=6"]
    later = [["evaluate", "RUN", "--task", str(rows), *fields, "-o", "OUT/scores", *sizes]]
    return Stages(["wt5", str(tiny(folder / "base", "t5"))], task, later)


def sparsefinder(folder: Path) -> Stages:
    text = folder / "text.txt"
    text.write_text("\n\n".join(sentence(n, 12) for n in range(60)) + "\n", encoding="utf-8")
    flags = ["--alpha", "1.5", "--grouping", "kmeans", "--num-clusters", "3", "--no-finetune", "--samples", "20"]
    flags += ["--projection-batch-size", "4", "--projection-epochs", "1"]
    train = ["--task", str(text), "--max-input-tokens", "16"]
    later = [["evaluate", "RUN", "--task", str(text), "-o", "OUT/scores", "--set", "evaluate.max_input_tokens=16"]]
    return Stages(["sparsefinder", str(tiny(folder / "base", "llama")), *flags], train, later, trains=False)


def regrad(folder: Path) -> Stages:
    toy_model(0).save_pretrained(folder / "base")
    toy_tokenizer().save_pretrained(folder / "base")
    rows = [
        {
            "test_id": number,
            "question": row.metadata["question"],
            "answer": row.target,
            "passages": list(row.metadata["passages"]),
        }
        for number, row in enumerate(examples(range(24), passages=2, seed=3))
    ]
    (folder / "data" / "popqa").mkdir(parents=True)
    (folder / "data" / "popqa" / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    texts = dict.fromkeys(passage for row in rows for passage in row["passages"])
    corpus = [{"_id": f"p{number}", "title": "", "text": text} for number, text in enumerate(texts)]
    write_lines(folder / "corpus.jsonl", corpus)
    flags = ["--rank", "2", "--layers", "2-3", "--initial-step-size", "0.1", "--prompt", prompt_file(folder)]
    train = ["--task", "multihop/popqa", "--data", str(folder / "data")]
    bank = ["bank", "build", "RUN", str(folder / "corpus.jsonl"), "-o", "OUT/bank", "--precision", "float32"]
    return Stages(["regrad", str(folder / "base"), *flags], train, [bank])


STAGES: dict[str, Callable[[Path], Stages]] = {
    "topk": topk,
    "cald": cald,
    "wt5": wt5,
    "sparsefinder": sparsefinder,
    "regrad": regrad,
}


def test_every_method_has_stages():
    assert set(STAGES) == set(NAMES)


def launch(folder: Path, name: str, commands: list[list[str]], processes: int) -> None:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [sys.executable, *(torchrun if processes > 1 else []), str(PROGRAM), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal_outcome(one: Path, two: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*.jsonl"))
    for name in names:
        if name.name.endswith(DETAILS_SUFFIX) or name.parent.name == "predictions" or name.parent == Path():
            assert sorted((two / name).read_bytes().split(b"\n")) == sorted((one / name).read_bytes().split(b"\n"))
    for name in sorted(path.relative_to(one) for path in one.rglob("results.json")):
        rows = [json.loads((folder / name).read_text(encoding="utf-8"))["rows"] for folder in (one, two)]
        for row, other in zip(*rows, strict=True):
            assert row["size"] == other["size"]
            # JSON has no NaN
            scores, others = (
                {key: math.nan if value is None else value for key, value in each["scores"].items()}
                for each in (row, other)
            )
            assert others == pytest.approx(scores, rel=1e-6, nan_ok=True)
    if (one / "bank").exists():
        with GradientBank(one / "bank") as expected, GradientBank(two / "bank") as found:
            assert found.ids() == expected.ids()
            pairs = [torch.as_tensor(bank.get(bank.ids())) for bank in (found, expected)]
            torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("method", STAGES)
def test_two_processes_lead_to_the_outcome_of_one(method, tmp_path):
    stages = STAGES[method](tmp_path)
    assert command(["convert", *stages.convert, "-o", str(tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    common = ["--max-steps", "3", "--learning-rate", "1e-2", "--optim", "sgd", "--per-device-train-batch-size", "2"]
    for name, processes in (("one", 1), ("two", 2)):
        size = [*common, "--gradient-accumulation-steps", str(2 // processes)] if stages.trains else []
        # later stages start from one model, so that the sum of gradients in another order is compared once
        later = [
            [word.replace("RUN", str(tmp_path / "one")).replace("OUT", str(tmp_path / f"out-{name}")) for word in words]
            for words in stages.later
        ]
        launch(tmp_path, name, [["train", str(tmp_path / name), *stages.train, *size], *later], processes)
    start = load_file(tmp_path / "base" / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert any(name not in start or not torch.equal(start[name], tensor) for name, tensor in one.items())
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert_equal_outcome(tmp_path / "out-one", tmp_path / "out-two")
    assert any((tmp_path / "out-one").iterdir())
