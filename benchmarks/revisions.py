"""Costs that grow with the data, of two revisions in one run.

    git worktree add ../before REVISION
    python benchmarks/revisions.py ../before/src --million FOLDER

Every measurement is a process of its own whose PYTHONPATH is the source folder of one revision; the revisions take
turns. Seconds are processor time, MB the peak resident size of the process. `--avx2` lets torch and oneDNN use the
instructions of a CPU without bfloat16 (for the cases bf16 and encode). FOLDER is that of `retrieval_million.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from growth import json_lines, text

Figures = dict[str, float]
HERE = Path(__file__).resolve().parent
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def command(*words: object, timeout: float | None = None) -> Figures:
    """Processor time and peak memory of a command of this revision."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "graftwork", *map(str, words)], capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise SystemExit(done.stderr[-1500:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "MB": after.ru_maxrss / 1024}


def shipped(kind: str) -> Path:
    from graftwork.demo import shipped_model

    return Path(shipped_model(kind))


def rows(folder: Path, count: int) -> Figures:
    import datasets  # noqa: F401  the import is not part of the growth

    from graftwork.settings.training import TrainingSettings
    from graftwork.tasks.loading import load_training

    before, started = peak(), time.process_time()
    load_training(TrainingSettings(tasks=(str(folder / "rows.jsonl"),)), None, 0)
    return {"s": time.process_time() - started, "MB more": peak() - before}


def start(folder: Path, count: int) -> Figures:
    """A training of one step on `count` rows: plain, packed, grouped by length."""
    found: Figures = {}
    flags = {
        "plain": (),
        "packed": ("--packing",),
        "grouped": ("--set", "train.train_sampling_strategy=group_by_length"),
    }
    for name, words in flags.items():
        run = folder / f"{name}-{random.random()}"
        command("convert", "topk", shipped("decoder"), "--attention-k", "16", "-o", run)
        cost = command("train", run, "--task", folder / "rows.jsonl", "--max-steps", "1", *words)
        found[f"{name} s"] = cost["s"]
    return found


def lengths(folder: Path, count: int) -> Figures:
    """Memory for each of the inputs of `predict`, of 280 words."""
    draw, costs = random.Random(0), []
    for number in (count // 8, count):
        path = folder / f"in-{number}.txt"
        path.write_text("".join(text(draw, 70) + "\n" for _ in range(number)), encoding="utf-8")
        words = ("predict", shipped("encoder_decoder"), "--input", path, "-o", folder / f"out-{random.random()}.jsonl")
        costs.append(command(*words, "--set", "evaluate.max_new_tokens=1")["MB"])
    return {"KB an input": 1024 * (costs[1] - costs[0]) / (count - count // 8), "MB": costs[1]}


def opened_bank(folder: Path) -> Any:
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout

    layout = Layout.of([("x", (8496,))])
    name = folder / f"bank-{random.random()}"
    return GradientBank.create(name, fingerprint={}, layout=layout, precision="bfloat16"), GradientBank(name)


def gradients(start: int, count: int) -> list[Any]:
    from graftwork.methods.regrad.bank.records import Gradient

    draw = np.random.default_rng(start)
    return [
        Gradient(f"p{n}", f"text {n}", draw.normal(size=8496).astype(np.float32)) for n in range(start, start + count)
    ]


def additions(folder: Path, count: int) -> Figures:
    """Passages added one at a time, and the fetch of three after each: means of the first and the last tenth."""
    bank, reader = opened_bank(folder)
    adding, fetching = [], []
    for number in range(count):
        record = gradients(number, 1)
        began = time.perf_counter()
        bank.append(record)
        adding.append(1000 * (time.perf_counter() - began))
        reader.refresh()
        began = time.perf_counter()
        reader.get([f"p{number // 2}", "p0", f"p{number}"])
        fetching.append(1000 * (time.perf_counter() - began))
    part = max(1, count // 10)
    ends = {"first": slice(None, part), "last": slice(-part, None)}
    kinds = (("add", adding), ("fetch", fetching))
    return {f"{kind} {name} ms": float(np.mean(times[end])) for kind, times in kinds for name, end in ends.items()}


def batches(folder: Path, count: int) -> Figures:
    """Gradients written a second in batches of 100: the first and the last tenth of the batches."""
    bank, _ = opened_bank(folder)
    times = []
    for number in range(0, count, 100):
        some = gradients(number, 100)
        began = time.perf_counter()
        bank.append(some)
        times.append(time.perf_counter() - began)
    part = max(1, len(times) // 10)
    return {"first /s": 100 / float(np.mean(times[:part])), "last /s": 100 / float(np.mean(times[-part:]))}


def search(folder: Path, count: int) -> Figures:
    """Questions a second of processor time, one by one, three hits each."""
    from graftwork.retrieval.embedded import build_embedded

    # words by Zipf's law, as in text
    draw = np.random.default_rng(0)
    texts = [[f"word{n}" for n in np.minimum(draw.zipf(1.15, 80), 200_000)] for _ in range(count)]
    with (folder / "corpus.tsv").open("w", encoding="utf-8") as file:
        file.write("id\ttext\ttitle\n")
        for number, words in enumerate(texts):
            file.write(f"{number}\t{' '.join(words)}\t{' '.join(words[:2])}\n")
    index = build_embedded(folder / "corpus.tsv", folder / f"index-{random.random()}")
    questions = [" ".join(draw.choice(texts[n], 8, replace=False)) for n in draw.integers(0, count, 300)]
    index.search(questions[:5], 3)
    began = time.process_time()
    for one in questions:
        index.search([one], 3)
    return {"questions/s": len(questions) / (time.process_time() - began)}


def million(folder: Path, count: int) -> Figures:
    """The same in the index of `retrieval_million.py`."""
    from graftwork.retrieval.opening import open_index
    from retrieval_million import questions

    place = Path(os.environ["MILLION"])
    asked = questions(Path(os.environ["MILLION_DATA"]), count)
    index = open_index(str(place / "index"))
    index.search(asked[:5], 3)
    began = time.process_time()
    for one in asked:
        index.search([one], 3)
    return {"questions/s": len(asked) / (time.process_time() - began)}


def small_llama(folder: Path, **sizes: int) -> Path:
    """A random decoder in bfloat16 with the tokenizer of the shipped one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = folder / "llama"
    if not place.exists():
        tokenizer = AutoTokenizer.from_pretrained(shipped("decoder"))
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def bf16(folder: Path, count: int) -> Figures:
    """Inputs a second of processor time with a checkpoint in bfloat16 and 110 million parameters."""
    from graftwork.pipeline.answers import predict
    from graftwork.pipeline.loading import load
    from graftwork.settings.evaluation import EvaluationSettings

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    loaded = load(small_llama(folder, **sizes))
    inputs = [text(random.Random(number), 12) for number in range(count)]
    settings = EvaluationSettings(max_new_tokens=2, batch_size=16)
    predict(loaded, inputs[:16], settings)
    began = time.process_time()
    predict(loaded, inputs, settings)
    return {"inputs/s": count / (time.process_time() - began)}


def encode(folder: Path, count: int) -> Figures:
    """Three passages encoded with a decoder in bfloat16 and 1.1 billion parameters."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 18, "num_attention_heads": 32}
    base = small_llama(folder, **sizes)
    corpus = folder / "three.jsonl"
    lines = [{"_id": f"p{n}", "title": "", "text": text(random.Random(n), 40)} for n in range(count)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = folder / f"run-{random.random()}"
    command("convert", "regrad", base, "-o", run)
    try:
        return command("bank", "build", run, corpus, timeout=float(os.environ.get("LIMIT", "400")))
    except subprocess.TimeoutExpired:
        return {"not finished in s": float(os.environ.get("LIMIT", "400"))}


def listing(folder: Path, count: int) -> Figures:
    return command("list", "methods")


def reporting(folder: Path, count: int) -> Figures:
    run = folder / f"run-{random.random()}"
    command("convert", "topk", shipped("decoder"), "--attention-k", "16", "-o", run)
    tasks = folder / "few.jsonl"
    tasks.write_text('{"input": "a", "target": "b"}\n' * 4, encoding="utf-8")
    command("evaluate", run, "--task", tasks)
    return command("report", run)


CASES: dict[str, tuple[Callable[[Path, int], Figures], int, str]] = {
    "rows": (rows, 1_000_000, "JSON lines read to train, the first time and again"),
    "start": (start, 50_000, "a training of one step on 50,000 rows, the first time and again"),
    "lengths": (lengths, 8_000, "memory of predict"),
    "additions": (additions, 500, "passages added to a bank one at a time"),
    "batches": (batches, 6_000, "gradients in batches of 100"),
    "search": (search, 20_000, "20,000 passages"),
    "search_more": (search, 200_000, "200,000 passages"),
    "million": (million, 500, "1,000,000 passages"),
    "bf16": (bf16, 64, "checkpoint in bfloat16"),
    "encode": (encode, 3, "three passages, 1.1 billion parameters in bfloat16"),
    "listing": (listing, 1, "list methods"),
    "reporting": (reporting, 1, "report"),
}
TWICE = ("rows", "start")
"""Cases whose second run finds a cache."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("before", type=Path, help="source folder of the earlier revision")
    options.add_argument(
        "--million", type=Path, help="folder of retrieval_million.py; without it, that case is left out"
    )
    options.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    options.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--avx2", action="store_true", help="use no instructions beyond AVX2 in bf16 and encode")
    options.add_argument("--limit", type=float, default=400, help="seconds after which an encoding is stopped")
    options.add_argument("--json", action="store_true")
    options.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.case:
        name, folder = chosen.case
        run, count, _ = CASES[name]
        print(json.dumps(run(Path(folder), count)))
        return
    sources = {"before": chosen.before.resolve(), "now": HERE.parent / "src"}
    table = []
    for name in chosen.only:
        if name == "million" and chosen.million is None:
            continue
        row: dict[str, Any] = {"case": name, "what": CASES[name][2]}
        with tempfile.TemporaryDirectory() as root:
            if name in TWICE:
                json_lines(Path(root) / "rows.jsonl", CASES[name][1], words=85 if name == "rows" else 40)
            for label, source in sources.items():
                environment = {
                    **os.environ,
                    "PYTHONPATH": f"{source}{os.pathsep}{HERE}",
                    "GRAFTWORK_CACHE": f"{root}/cache-{label}",
                    # the extension of the installed revision
                    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
                    "LIMIT": str(chosen.limit),
                    "MILLION": str(chosen.million),
                    "MILLION_DATA": str(chosen.data),
                    **(AVX2 if chosen.avx2 and name in ("bf16", "encode") else {}),
                }
                words = [sys.executable, __file__, str(chosen.before), "--case", name, root]
                for attempt in ("", " again") if name in TWICE else ("",):
                    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
                    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr[-300:]
                    row[label + attempt] = found
                    if not chosen.json:
                        print(f"{name} ({row['what']}), {label}{attempt}: {found}", flush=True)
        table.append(row)
    if chosen.json:
        print(json.dumps({"kind": "measured", "load": os.getloadavg()[0], "rows": table}))


if __name__ == "__main__":
    main()
