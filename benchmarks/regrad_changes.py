"""Thousands of single additions, deletions and questions on one bank and index, with killed processes on the way.

Half of the changes add a passage, a fifth deletes one, the others ask for one that exists: a search of the index and
the sum of three gradients. A process that is killed at a random moment is started again and repeats its last change.
At the end every passage is looked for, the bank is verified, and times of the first and the last tenth are compared.

    python benchmarks/regrad_changes.py --changes 5000 --kills 20
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

NUMBERS = 8496
"""Numbers of one gradient: those of the shipped decoder with rank 8."""
KEPT = 3
"""Passages that are never deleted, so that questions always have three gradients."""


def changes(count: int, seed: int) -> Iterator[tuple[int, str, int]]:
    """Number, kind and passage of every change; the same in every process."""
    draw = random.Random(seed)
    alive = list(range(KEPT))
    for number in range(count):
        share = draw.random()
        if share < 0.5:
            alive.append(KEPT + number)
            yield number, "add", KEPT + number
        elif share < 0.7 and len(alive) > KEPT:
            at = draw.randrange(KEPT, len(alive))
            alive[at], alive[-1] = alive[-1], alive[at]
            yield number, "delete", alive.pop()
        else:
            yield number, "ask", draw.choice(alive)


def remaining(count: int, seed: int) -> set[int]:
    found = set(range(KEPT))
    for _, kind, passage in changes(count, seed):
        if kind == "add":
            found.add(passage)
        elif kind == "delete":
            found.discard(passage)
    return found


def word(passage: int) -> str:
    """A word that occurs in one passage only."""
    return "zq" + "".join(chr(ord("a") + int(digit)) for digit in str(passage)) + "x"


def text_of(passage: int) -> str:
    draw = random.Random(passage)
    return f"{word(passage)} {' '.join(f'word{draw.randrange(2000)}' for _ in range(80))}"


def work(folder: Path, start: int, count: int, seed: int) -> None:
    """Carry out the changes from `start` on; one line of JSON after each."""
    from graftwork.methods.regrad.bank.changes import added, delete
    from graftwork.methods.regrad.bank.files import text_key
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.records import Gradient
    from graftwork.retrieval import Passage
    from graftwork.retrieval.embedded import EmbeddedIndex

    def gradient(passage: int) -> Gradient:
        values = np.random.default_rng(passage).normal(size=NUMBERS).astype(np.float32)
        return Gradient(f"p{passage}", text_of(passage), values)

    bank, index = GradientBank(folder / "bank", "a"), EmbeddedIndex(folder / "index")
    # the first call of every operation loads libraries
    index.search([word(0)], 1)
    bank.get(["p0"])
    print("ready", flush=True)
    for number, kind, passage in changes(count, seed):
        if number < start:
            continue
        name = f"p{passage}"
        began = time.perf_counter()
        right = True
        if kind == "add":
            one = Passage(name, text_of(passage))
            with added(bank, index, {name: (one, text_key(one.text))}):
                bank.append([gradient(passage)])
        elif kind == "delete":
            delete(bank, index, [name])
        else:
            hits = index.search([word(passage)], 1)[0]
            bank.refresh()
            sums = bank.sums([{name: 1.0, "p0": 1.0, "p1": 1.0}])
            right = [hit.id for hit in hits] == [name] and bool(sums.isfinite().all())
        line = {"number": number, "kind": kind, "seconds": time.perf_counter() - began, "right": right}
        print(json.dumps(line), flush=True)


def begin(folder: Path) -> None:
    """Create bank and index with the passages that stay."""
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout
    from graftwork.methods.regrad.bank.records import Gradient
    from graftwork.retrieval.embedded import build_embedded

    bank = GradientBank.create(
        folder / "bank", fingerprint={}, layout=Layout.of([("x", (NUMBERS,))]), precision="bfloat16"
    )
    bank.append(Gradient(f"p{n}", text_of(n), np.ones(NUMBERS, np.float32)) for n in range(KEPT))
    rows = [json.dumps({"_id": f"p{n}", "title": "", "text": text_of(n)}) for n in range(KEPT)]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    build_embedded(folder / "corpus.jsonl", folder / "index")


def run(folder: Path, chosen: argparse.Namespace) -> tuple[list[dict[str, float]], int, int]:
    """Start workers until every change is made; return their lines, and the number of kills and of files at most."""
    draw, done, kills, most_files = random.Random(chosen.seed + 1), [], 0, 0
    while len(done) < chosen.changes:
        options = ["--work", str(folder), "--start", str(len(done))]
        command = [sys.executable, "-W", "ignore", __file__, *options]
        command += ["--changes", str(chosen.changes), "--seed", str(chosen.seed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("a worker did not start")
        timer = None
        if kills < chosen.kills:
            # the changes are shared out over the processes
            after = chosen.changes / (chosen.kills + 1) * 0.06 * draw.uniform(0.5, 1.0)
            timer = threading.Timer(after, process.send_signal, [signal.SIGKILL])
            timer.start()
        for line in process.stdout:
            if line.endswith("\n"):
                done.append(json.loads(line))
        code = process.wait()
        if timer is not None:
            timer.cancel()
        kills += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"a worker ended with {code}")
        files = sum(path.is_file() for path in folder.rglob("*"))
        most_files = max(most_files, files)
        print(f"{len(done)} changes, {files} files", flush=True)
    return done, kills, most_files


def tenth(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--changes", type=int, default=5000)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.work:
        work(chosen.work, chosen.start, chosen.changes, chosen.seed)
        return
    from graftwork.methods.regrad.bank.check import verify
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.retrieval.embedded import EmbeddedIndex

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        begin(folder)
        lines, kills, files = run(folder, chosen)
        print(f"{len(lines)} changes, {kills} kills, at most {files} files")
        print("| change | number | p95 of the first tenth | p95 of the last tenth | ratio |\n|---|---|---|---|---|")
        for kind in ("add", "delete", "ask"):
            spent = [line["seconds"] for line in lines if line["kind"] == kind]
            share = max(2, len(spent) // 10)
            first, last = tenth(spent[:share]), tenth(spent[-share:])
            print(f"| {kind} | {len(spent)} | {1e3 * first:.0f} ms | {1e3 * last:.0f} ms | {last / first:.2f} |")
        wrong = sum(not line["right"] for line in lines)
        alive = remaining(chosen.changes, chosen.seed)
        with GradientBank(folder / "bank") as bank:
            found = verify(bank)
            held = set(bank.ids()) == {f"p{n}" for n in alive}
        index = EmbeddedIndex(folder / "index", verify=True)
        hits = index.search([word(n) for n in sorted(alive)], 1)
        searched = [[hit.id for hit in one] for one in hits] == [[f"p{n}"] for n in sorted(alive)]
        print(
            f"questions answered wrongly: {wrong}; bank verified: {found.whole}; bank holds what was added and not "
            f"deleted: {held}; index finds each of them: {searched and len(index) == len(alive)}"
        )
        raise SystemExit(bool(wrong) or not (found.whole and held and searched and len(index) == len(alive)))


if __name__ == "__main__":
    main()
