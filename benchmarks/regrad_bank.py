"""Gradient bank: time to open and fetch at several sizes, and memory that is independent of the bank's size.

Expected: opening reads two manifests and a commit record, so its time is independent of the bank's size; fetching
three by id costs an index look-up and three reads; only the cache stays in memory, and its size is bounded. Compared
with the original's format: all gradients in one file, loaded completely before the first answer.

    python benchmarks/regrad_bank.py --gradients 100 1000 10000 --numbers 8496
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PEAK = """
def peak():  # not ru_maxrss, which is inherited from the parent process
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""

READER = """
import json, random, sys, time
import lance, torch  # loaded by any reader; not counted
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
before = peak()
folder, count, rounds, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
started = time.perf_counter()
bank = GradientBank(folder, cache_bytes=cache)
opened = time.perf_counter() - started
draw, times = random.Random(0), []
for _ in range(rounds):
    names = [f"p{draw.randrange(count)}" for _ in range(3)]
    started = time.perf_counter()
    bank.get(names)
    times.append(time.perf_counter() - started)
bank.close()
grown = peak() - before
print(json.dumps({"open_ms": 1000 * opened, "fetch_ms": 1000 * sorted(times)[rounds // 2],
                  "fetch_p95_ms": 1000 * sorted(times)[rounds * 95 // 100], "memory_mb": grown / 1e6}))
"""

ORIGINAL = """
import json, sys, time, torch
before = peak()
started = time.perf_counter()
stored = torch.load(sys.argv[1], weights_only=True)
opened = time.perf_counter() - started
grown = peak() - before
print(json.dumps({"open_ms": 1000 * opened, "memory_mb": grown / 1e6}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gradients", type=int, nargs="+", default=[100, 1000, 10000])
    options.add_argument("--numbers", type=int, default=8496, help="number of elements in one gradient")
    options.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16", "int8"])
    options.add_argument("--batch", type=int, default=100, help="gradients in one append")
    options.add_argument("--rounds", type=int, default=200, help="fetches of three gradients each")
    options.add_argument("--cache", type=int, default=8 << 20, help="cache size in bytes")
    chosen = options.parse_args()
    headings = "gradients,appended/s,open ms,fetch 3 ms,p95 ms,memory MB,bytes / numbers,original open ms,original MB"
    print(headings.replace(",", "\t"))
    with tempfile.TemporaryDirectory() as folder:
        for count in chosen.gradients:
            row = measure(Path(folder) / str(count), count, chosen)
            print("\t".join(str(cell) for cell in row), flush=True)


def measure(folder: Path, count: int, chosen: argparse.Namespace) -> list[object]:
    import torch

    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout
    from graftwork.methods.regrad.bank.records import Gradient

    bank = GradientBank.create(
        folder / "bank", fingerprint={}, layout=Layout.of([("x", (chosen.numbers,))]), precision=chosen.precision
    )
    draw = np.random.default_rng(0)
    spent = 0.0
    for first in range(0, count, chosen.batch):
        values = draw.normal(size=(min(chosen.batch, count - first), chosen.numbers)).astype(np.float32)
        batch = [Gradient(f"p{first + at}", f"text {first + at}", row) for at, row in enumerate(values)]
        started = time.perf_counter()
        bank.append(batch)
        spent += time.perf_counter() - started
    bank.compact()
    stats = bank.stats()
    ours = run(READER, folder / "bank", count, chosen.rounds, chosen.cache)
    # the original stores float32 tensors in one pickled dict
    stored = {f"{number}_0": {"x": torch.zeros(chosen.numbers) + number} for number in range(count)}
    torch.save(stored, folder / "original.pt")
    del stored
    theirs = run(ORIGINAL, folder / "original.pt")
    (folder / "original.pt").unlink()
    ratio = stats["bytes"] / (count * stats["bytes_per_record"])
    return [
        count,
        round(count / spent),
        *(round(ours[name], 2) for name in ours),
        round(ratio, 4),
        round(theirs["open_ms"], 1),
        round(theirs["memory_mb"], 1),
    ]


def run(code: str, *words: object) -> dict[str, float]:
    command = [sys.executable, "-c", PEAK + code, *map(str, words)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


if __name__ == "__main__":
    main()
