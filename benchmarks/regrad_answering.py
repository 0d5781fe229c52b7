"""Answering: questions one by one and 16 at once, each with an update of its own, and memory against the bank's size.

Expected: a token costs a pass over all weights whether one row needs it or sixteen, so batches pay until rows fill the
processor, although every row brings adapter matrices of its own. What a question adds to a plain one is reading K
gradients and a low-rank product a layer. Memory holds the cache and the updates of one batch, whatever the bank holds.
Beside it stand the same batches with strength 0 (the adapter as learned, nothing read), the pretrained model without
passages, and retrieval-augmented generation: the passages in the prompt of the pretrained model.

    python benchmarks/regrad_answering.py --model ../shared/models/stories260K --data ../shared/data

The gradients of passages that answers are timed with are real ones; the rest of a large bank are random numbers of the
same layout, because only their number matters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import parser, prepare
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import Gradient
from graftwork.methods.regrad.encoding.encoder import PassageEncoder, encode_passages
from graftwork.methods.regrad.text.requests import Question
from graftwork.pipeline.loading import load_model
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.tasks import get_task

PEAK = """
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""
READER = """
import json, sys
from graftwork.pipeline.loading import load
from graftwork.methods.regrad.answering import Answerer
from graftwork.methods.regrad.bank import GradientBank
from graftwork.methods.regrad.questions import Question
folder, bank, threads = sys.argv[1:4]
import torch
torch.set_num_threads(int(threads))
converted = load(folder)
config, text = converted.methods[-1].config, "Who lives in the house?"
# whatever the model itself needs
Answerer(converted.model, converted.tokenizer, config=config).answer([Question(text, ())] * 16, max_new_tokens=8)
before = peak()
with GradientBank(bank, cache_bytes=1 << 20) as opened:
    engine = Answerer(converted.model, converted.tokenizer, opened, config=config)
    for number in range(8):
        names = [[f"r{(48 * number + 3 * row + rank) * 7 % len(opened)}" for rank in range(3)] for row in range(16)]
        engine.answer([Question(text, tuple(three)) for three in names], max_new_tokens=8)
print(json.dumps({"memory_mb": (peak() - before) / 1e6}))
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="folder or hub id of a Llama")
    options.add_argument("--data", required=True, help="folder that holds popqa/ and dpr/psgs_w100.tsv")
    options.add_argument("--questions", type=int, default=32)
    options.add_argument("--tokens", type=int, default=20, help="most tokens of an answer")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--gradients", type=int, nargs="*", default=[100, 1000, 10000], help="sizes of banks")
    chosen = options.parse_args()
    prepare(chosen)
    model, tokenizer = load_model(chosen.model, dtype=chosen.dtype)
    method = ReGrad(rank=chosen.rank, b_std=0.02)
    converted = convert(Converted(model.to(chosen.device), tokenizer=tokenizer), method)
    about = {"kind": "measured", "device": chosen.device, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        rows = speeds(converted, folder, chosen)
        if not chosen.json:
            print(", ".join(f"{name} {value}" for name, value in about.items()))
            show(rows)
        memory = memories(converted, folder, chosen)
    if chosen.json:
        print(json.dumps({**about, "rows": rows, "memory": memory}))
    else:
        show(memory)


def show(rows: list[dict[str, Any]]) -> None:
    print("\t".join(rows[0]) if rows else "")
    for row in rows:
        print("\t".join(map(str, row.values())), flush=True)


def answerer_of(converted: Converted, bank: GradientBank | None, batch_size: int = 16) -> Answerer:
    config: Any = converted.methods[-1].config
    return Answerer(converted.model, converted.tokenizer, bank, config=config, batch_size=batch_size)


def speeds(converted: Converted, folder: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Questions a second of every way, in turns, the fastest round of each."""
    config: Any = converted.methods[-1].config
    encoder = PassageEncoder(converted.model, converted.tokenizer, config)
    passages = list(islice(CorpusReader(find_corpus(Path(chosen.data) / "dpr" / "psgs_w100.tsv")), 24))
    bank = encoder.open_bank(folder / "real")
    encode_passages(encoder, bank, passages)
    texts = [row.input for row in get_task("multihop/popqa").load(Path(chosen.data), "dev").rows[: chosen.questions]]
    questions = [
        Question(text, tuple(passages[(3 * number + rank) % len(passages)] for rank in range(3)))
        for number, text in enumerate(texts)
    ]
    ways = {
        "ReGrad": questions,
        "strength 0": [replace(one, strength=0.0) for one in questions],
        "direct": [replace(one, adapter=False, passages=()) for one in questions],
        "RAG": [replace(one, adapter=False, context=True) for one in questions],
    }
    candidates: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in chosen.batches:
        engine = answerer_of(converted, bank, size)
        for name, given in ways.items():
            # one by one as a user would ask: a call for each
            parts = [given[start : start + size] for start in range(0, len(given), size)]
            candidates[name, size] = lambda engine=engine, parts=parts: [
                engine.answer(part, max_new_tokens=chosen.tokens) for part in parts
            ]
    best: dict[tuple[str, int], float] = {}
    tokens: dict[tuple[str, int], int] = {}
    for number in range(chosen.rounds + 1):
        for key, run in candidates.items():
            started = time.perf_counter()
            answers = run()
            spent = time.perf_counter() - started
            tokens[key] = sum(answer.tokens for part in answers for answer in part)
            if number:
                best[key] = min(best.get(key, spent), spent)
        print(f"round {number} done", file=sys.stderr)
    return [
        {
            "way": name,
            "batch": size,
            "questions_per_second": round(len(questions) / spent, 2),
            "speed": round(best[name, chosen.batches[0]] / spent, 2),
            "tokens": tokens[name, size],
        }
        for (name, size), spent in best.items()
    ]


def memories(converted: Converted, folder: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory that answering from banks of several sizes takes beyond the model's, each in a process of its own."""
    converted.save(folder / "run")
    config: Any = converted.methods[-1].config
    encoder = PassageEncoder(converted.model, converted.tokenizer, config)
    draw, rows = np.random.default_rng(0), []
    for count in chosen.gradients:
        bank = encoder.open_bank(folder / str(count))
        for first in range(0, count, 500):
            names = range(first, min(first + 500, count))
            values = draw.normal(size=(len(names), bank.layout.size)).astype(np.float32) * 1e-4
            bank.append([Gradient(f"r{at}", f"text {at}", row) for at, row in zip(names, values, strict=True)])
        # gradients that came after the index was made are searched for one by one until the bank is tidied up
        bank.compact()
        words = [sys.executable, "-c", PEAK + READER, folder / "run", bank.place, torch.get_num_threads()]
        found = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        size = round(count * bank.manifest.stride / 1e6, 2)
        memory = json.loads(found.stdout.splitlines()[-1])["memory_mb"]
        print(f"{count} gradients: {memory:.1f} MB", file=sys.stderr)
        rows.append({"gradients": count, "bank_mb": size, "memory_mb": round(memory, 1)})
    return rows


if __name__ == "__main__":
    main()
