"""Growth of time and memory with the amount of work, at n, 4n and 16n, each in a fresh process.

For every case the exponent b of cost = c · n^b is fitted to processor time, or to wall time where operations wait for
the disk: 1 is linear, 0 is constant; constant parts of a cost lower it. Memory is the peak resident size above that of
the same process after imports.

    python benchmarks/growth.py                        # all cases
    python benchmarks/growth.py --only rows_first rows_again bank
    python benchmarks/growth.py --json

Cases whose unit is "each" print the time of one operation at that size, the others the time of the whole.
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

Outcome = dict[str, float]
WORDS = [f"word{number}" for number in range(5000)]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def json_lines(path: Path, count: int, words: int = 40) -> Path:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"input": text(draw, words), "target": WORDS[number % 5000]}) + "\n")
    return path


def timed(run: Callable[[], Any]) -> Outcome:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def rows(folder: Path, count: int, *, again: bool) -> Outcome:
    """Read a file of JSON lines for a training: the first time, and from the cache."""
    import datasets  # noqa: F401  the import is not part of the growth

    from graftwork.settings.training import TrainingSettings
    from graftwork.tasks.loading import load_training

    settings = TrainingSettings(tasks=(str(json_lines(folder / "rows.jsonl", count)),))
    if again:
        subprocess.run([sys.executable, __file__, "--fill", str(folder / "rows.jsonl")], check=True)
    return timed(lambda: load_training(settings, None, 0))


def lengths(folder: Path, count: int) -> Outcome:
    """Count the tokens of all examples, for packing and length grouping, the first time."""
    import datasets  # noqa: F401

    from graftwork.demo import shipped_model
    from graftwork.pipeline.loading import load_model
    from graftwork.settings.training import TrainingSettings
    from graftwork.tasks.loading import load_training
    from graftwork.training.data import training_data

    settings = TrainingSettings(tasks=(str(json_lines(folder / "rows.jsonl", count)),))
    model, tokenizer = load_model(shipped_model("encoder_decoder"))
    examples = load_training(settings, None, 0).examples
    encoded: Any = training_data(model, tokenizer, examples, settings)[0]
    return timed(encoded.lengths)


def packed(folder: Path, count: int, *, again: bool) -> Outcome:
    """Count the tokens of all examples and fill the first rows of a packed training; first, and from the cache."""
    from graftwork.demo import shipped_model
    from graftwork.pipeline.loading import load_model
    from graftwork.settings.training import TrainingSettings
    from graftwork.tasks.loading import load_training
    from graftwork.training.data import training_data
    from graftwork.training.sampling import MixtureSchedule, PackedSampler

    settings = TrainingSettings(tasks=(str(json_lines(folder / "rows.jsonl", count)),), packing=True)
    model, tokenizer = load_model(shipped_model("encoder_decoder"))
    examples = load_training(settings, None, 0).examples

    def pack() -> None:
        encoded: Any = training_data(model, tokenizer, examples, settings)[0]
        room = (settings.input_limit, settings.target_limit)
        sampler = PackedSampler(MixtureSchedule([count], [1.0], 0), encoded.lengths(), room)
        next(iter(sampler))

    if again:
        pack()
    return timed(pack)


def start(folder: Path, count: int) -> Outcome:
    """`graftwork train` of one step on a file that is in the cache."""
    from graftwork.demo import shipped_model

    path = json_lines(folder / "rows.jsonl", count)
    subprocess.run([sys.executable, __file__, "--fill", str(path)], check=True)
    run = str(folder / "run")
    words = [sys.executable, "-m", "graftwork"]
    convert = ["convert", "topk", str(shipped_model("decoder")), "--attention-k", "16", "-o", run]
    subprocess.run([*words, *convert], check=True, capture_output=True)
    return child([*words, "train", run, "--task", str(path), "--max-steps", "1"])


def encoding(folder: Path, count: int) -> Outcome:
    """`graftwork bank build` of passages of 100 words."""
    from graftwork.demo import shipped_model

    draw = random.Random(0)
    lines = [{"_id": f"p{number}", "title": "", "text": text(draw, 100)} for number in range(count)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words, run = [sys.executable, "-m", "graftwork"], str(folder / "run")
    subprocess.run(
        [*words, "convert", "regrad", str(shipped_model("decoder")), "-o", run], check=True, capture_output=True
    )
    return child([*words, "bank", "build", run, str(corpus), "-o", str(folder / "bank")])


def batches(folder: Path, count: int) -> Outcome:
    """Write a batch of 100 gradients into a bank of `count` that was filled so; the mean of the last ten."""
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout
    from graftwork.methods.regrad.bank.records import Gradient

    layout = Layout.of([("x", (8496,))])
    made = GradientBank.create(folder / "bank", fingerprint={}, layout=layout, precision="bfloat16")
    draw, times = np.random.default_rng(0), []
    for first in range(0, count, 100):
        rows = draw.normal(size=(100, 8496)).astype(np.float32)
        began = time.perf_counter()
        made.append(Gradient(f"p{first + n}", f"text {first + n}", rows[n]) for n in range(100))
        times.append(time.perf_counter() - began)
    return {"seconds": float(np.mean(times[-10:]))}


def predict(folder: Path, count: int) -> Outcome:
    """Answer a file of inputs with a tiny model."""
    import datasets  # noqa: F401

    from graftwork.demo import shipped_model
    from graftwork.pipeline.answers import predict_to_file
    from graftwork.pipeline.loading import load
    from graftwork.settings.evaluation import EvaluationSettings

    path = folder / "inputs.txt"
    draw = random.Random(0)
    path.write_text("".join(text(draw, 12) + "\n" for _ in range(count)), encoding="utf-8")
    settings = EvaluationSettings(max_new_tokens=2, batch_size=64)
    model = load(shipped_model("encoder_decoder"))
    return timed(lambda: predict_to_file(model, path, folder / "answers.jsonl", settings))


def bank(folder: Path, count: int) -> Outcome:
    """Add one passage to a bank, and fetch three afterwards; the mean of the last 20 of `count` additions."""
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout
    from graftwork.methods.regrad.bank.records import Gradient

    numbers = 8496
    made = GradientBank.create(
        folder / "bank", fingerprint={}, layout=Layout.of([("x", (numbers,))]), precision="bfloat16"
    )
    reader, draw = GradientBank(folder / "bank"), np.random.default_rng(0)
    made.append(
        Gradient(f"p{n}", f"text {n}", draw.normal(size=numbers).astype(np.float32)) for n in range(max(0, count - 20))
    )
    adding = fetching = 0.0
    for number in range(max(0, count - 20), count):
        values = draw.normal(size=numbers).astype(np.float32)
        started = time.perf_counter()
        made.append([Gradient(f"p{number}", f"text {number}", values)])
        adding += time.perf_counter() - started
        reader.refresh()
        started = time.perf_counter()
        reader.get([f"p{number // 2}", "p0", f"p{number}"])
        fetching += time.perf_counter() - started
    return {"seconds": (adding + fetching) / 20, "adding": adding / 20, "fetching": fetching / 20}


def bank_changes(folder: Path, count: int) -> Outcome:
    """The same where all `count` passages were added one at a time."""
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout
    from graftwork.methods.regrad.bank.records import Gradient

    numbers = 8496
    made = GradientBank.create(
        folder / "bank", fingerprint={}, layout=Layout.of([("x", (numbers,))]), precision="bfloat16"
    )
    reader, draw, times = GradientBank(folder / "bank"), np.random.default_rng(0), []
    for number in range(count):
        values = draw.normal(size=numbers).astype(np.float32)
        started = time.perf_counter()
        made.append([Gradient(f"p{number}", f"text {number}", values)])
        added = time.perf_counter() - started
        reader.refresh()
        started = time.perf_counter()
        reader.get([f"p{number // 2}", "p0", f"p{number}"])
        times.append((added, time.perf_counter() - started))
    adding, fetching = np.mean(times[-max(1, count // 10) :], axis=0)
    files = sum(path.is_file() for path in (folder / "bank").rglob("*"))
    return {"seconds": adding + fetching, "adding": adding, "fetching": fetching, "files": files}


def search(folder: Path, count: int) -> Outcome:
    """Questions to the embedded index, one by one, three hits each."""
    from graftwork.retrieval.embedded import build_embedded
    from retrieval_embedded import question, write_corpus

    corpus = write_corpus(folder / "corpus.tsv", count)
    index = build_embedded(folder / "corpus.tsv", folder / "index")
    questions = [question(row) for row in random.Random(1).sample(corpus, 200)]
    found = timed(lambda: [index.search([one], 3) for one in questions])
    return {**found, "seconds": found["seconds"] / 200, "cpu": found["cpu"] / 200}


def step(folder: Path, count: int) -> Outcome:
    """One training step of a top-k decoder on `count` tokens."""
    import torch

    import graftwork as gw
    from graftwork.demo import shipped_model
    from graftwork.pipeline.loading import load

    model = gw.convert(load(shipped_model("decoder")), gw.TopK(attention_k=32, attention_chunk_size=64)).model.train()
    ids = torch.randint(5, 100, (1, count))
    return timed(lambda: model(input_ids=ids, labels=ids).loss.backward())


def sweep_report(folder: Path, count: int) -> Outcome:
    """Report of a run with a sweep of `count` points."""
    import graftwork as gw
    from graftwork.core.run_folder import RunFolder
    from graftwork.demo import shipped_model
    from graftwork.metrics.results import ResultRow, Results
    from graftwork.pipeline.loading import load
    from graftwork.reporting.render import report

    run = RunFolder(gw.convert(load(shipped_model("decoder")), gw.TopK(feed_forward_k=32)).save(folder / "run"))
    points = tuple(
        ResultRow("task", "dev", f"feed_forward_k={n}", {"accuracy": 50.0 + n % 7}, 100, {"feed_forward_k": n + 1})
        for n in range(count)
    )
    Results(model="m", method="topk", rows=points).write(run.results_file)
    return timed(lambda: report(run.path))


def command(folder: Path, count: int) -> Outcome:
    """`graftwork list methods`, whatever the size."""
    return child([sys.executable, "-m", "graftwork", "list", "methods"])


def child(words: list[str]) -> Outcome:
    """Costs of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - started,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": after.ru_maxrss / 1024,
    }


CASES: dict[str, tuple[Callable[[Path, int], Outcome], int, str]] = {
    "rows_first": (lambda folder, count: rows(folder, count, again=False), 50_000, "all"),
    "rows_again": (lambda folder, count: rows(folder, count, again=True), 50_000, "all"),
    "lengths": (lengths, 25_000, "all"),
    "packed_first": (lambda folder, count: packed(folder, count, again=False), 12_500, "all"),
    "packed_again": (lambda folder, count: packed(folder, count, again=True), 12_500, "all"),
    "start": (start, 12_500, "all"),
    "encoding": (encoding, 32, "all"),
    "batches": (batches, 1_000, "each"),
    "predict": (predict, 1_000, "all"),
    "bank": (bank, 1_000, "each"),
    "bank_changes": (bank_changes, 64, "each"),
    "search": (search, 20_000, "each"),
    "step": (step, 256, "all"),
    "sweep_report": (sweep_report, 8, "all"),
    "command": (command, 1, "each"),
}


def run_case(name: str, count: int) -> Outcome:
    """Measure a case in a fresh process with a cache of its own."""
    with tempfile.TemporaryDirectory() as root:
        done = subprocess.run(
            [sys.executable, __file__, "--case", name, "--size", str(count), "--folder", root],
            env={**os.environ, "GRAFTWORK_CACHE": f"{root}/cache"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{name} at {count} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exponent(counts: list[int], costs: list[float]) -> float:
    """Slope of log cost over log size by least squares; costs are clipped at a millionth."""
    return float(np.polyfit(np.log(counts), np.log(np.maximum(costs, 1e-6)), 1)[0])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--scale", type=float, default=1.0, help="factor on the smallest size of every case")
    options.add_argument("--json", action="store_true")
    options.add_argument("--case", help=argparse.SUPPRESS)
    options.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--fill", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.fill:
        from graftwork.settings.training import TrainingSettings
        from graftwork.tasks.loading import load_training

        load_training(TrainingSettings(tasks=(chosen.fill,)), None, 0)
        return
    if chosen.case:
        print(json.dumps(CASES[chosen.case][0](chosen.folder, chosen.size)))
        return
    table = []
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", file=sys.stderr)
    for name in chosen.only:
        _, smallest, unit = CASES[name]
        counts = [int(smallest * chosen.scale * factor) for factor in ((1, 4, 16) if smallest > 1 else (1,))]
        found = [run_case(name, count) for count in counts]
        row = {"case": name, "unit": unit, "sizes": counts, "measured": found}
        row["time_exponent"] = (
            0.0 if len(counts) == 1 else exponent(counts, [one.get("cpu", one["seconds"]) for one in found])
        )
        if "peak_mb" in found[0]:
            row["memory_exponent"] = exponent(counts, [max(one["peak_mb"], 1.0) for one in found])
        table.append(row)
        if not chosen.json:
            cells = ", ".join(
                f"{count:,}: " + " ".join(f"{key} {value:.4g}" for key, value in one.items())
                for count, one in zip(counts, found, strict=True)
            )
            memory = f", memory n^{row['memory_exponent']:.2f}" if "memory_exponent" in row else ""
            print(f"{name} ({unit}): time n^{row['time_exponent']:.2f}{memory}; {cells}", flush=True)
    if chosen.json:
        print(json.dumps({"kind": "measured", "processors": os.cpu_count(), "rows": table}))


if __name__ == "__main__":
    main()
