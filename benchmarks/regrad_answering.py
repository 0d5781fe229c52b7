"""Answering speed with one and 16 questions per batch, each with a separate update, and memory by bank size.

Expected: a decoding step reads all weights regardless of the number of rows, so batches are faster until the rows
saturate the processor, although every row has separate adapter matrices. Compared with a plain question, ReGrad adds
reading K gradients and one low-rank product per layer. Memory contains the cache and the updates of one batch,
independently of the bank's size. Compared with the same batches at strength 0 (adapter without a step), the pretrained
model without passages, and retrieval-augmented generation (passages in the prompt of the pretrained model).

    python benchmarks/regrad_answering.py --model ../shared/models/stories260K --data ../shared/data

Timed answers use real gradients; the large banks contain random numbers of the same layout, since only their size
matters.
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
def peak():  # not ru_maxrss, which is inherited from the parent process
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""
READER = """
import json, sys
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.text.requests import Question
from graftwork.pipeline.loading import load
folder, bank, threads = sys.argv[1:4]
import torch
torch.set_num_threads(int(threads))
converted = load(folder)
config, text = converted.methods[-1].config, "Who lives in the house?"
# memory of the model itself
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
    options.add_argument("--data", required=True, help="folder with popqa/ and dpr/psgs_w100.tsv")
    options.add_argument("--questions", type=int, default=32)
    options.add_argument("--tokens", type=int, default=20, help="maximum tokens of an answer")
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
    """Return questions per second of every configuration: the fastest of several interleaved rounds."""
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
            # batches of 1 are separate calls, as from separate users
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
    """Return the memory of answering beyond the model's for several bank sizes, each in a separate process."""
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
        # gradients appended after index creation are scanned until the bank is compacted
        bank.compact()
        words = [sys.executable, "-c", PEAK + READER, folder / "run", bank.backend, torch.get_num_threads()]
        found = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        size = round(count * bank.manifest.stride / 1e6, 2)
        memory = json.loads(found.stdout.splitlines()[-1])["memory_mb"]
        print(f"{count} gradients: {memory:.1f} MB", file=sys.stderr)
        rows.append({"gradients": count, "bank_mb": size, "memory_mb": round(memory, 1)})
    return rows


if __name__ == "__main__":
    main()
