"""The embedded index: how fast it is built, queried, and how it takes a kill in the middle.

Generated passages of 100 words follow Zipf's law over a vocabulary of 200,000 words, with English stop words the most
frequent, as in real text; queries are three stop words, five words of one passage and its title. Every stage of the
real build is in the time: reading, analysis, indexing, committing, sealing.

    python benchmarks/retrieval_embedded.py --passages 100000 --kill
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from graftwork.retrieval.analysis import STOP_WORDS
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.index_storage import RECORD_FILE

BUILD = """
import sys; from graftwork.retrieval.embedded import build_embedded
build_embedded(sys.argv[1], sys.argv[2], commit_passages=10_000)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--passages", type=int, default=100_000)
    options.add_argument("--queries", type=int, default=3000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--kill", action="store_true", help="also kill a build in the middle and go on")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        rows = write_corpus(folder / "corpus.tsv", chosen.passages)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        for number in range(chosen.rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            index = build_embedded(folder / "corpus.tsv", folder / f"index{number}")
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"build: {len(index) / wall:.0f} passages/s ({wall:.1f} s, processor time {cpu:.1f} s)", flush=True)
        queries = [question(row) for row in rows[: chosen.queries]]
        for threads in (1, 2):
            index = EmbeddedIndex(folder / "index0", threads=threads)
            for _ in range(chosen.rounds):
                wall, cpu = time.perf_counter(), time.process_time()
                found = index.search(queries, 3)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                right = sum(hits[0].id == row[0] for hits, row in zip(found, rows, strict=False)) / len(queries)
                print(
                    f"search, {threads} threads: {len(queries) / wall:.0f} queries/s (processor time "
                    f"{1e6 * cpu / len(queries):.0f} µs each), first hit right {right:.3f}",
                    flush=True,
                )
        if chosen.kill:
            kill(folder, chosen.passages)


def write_corpus(path: Path, count: int) -> list[tuple[str, str, str]]:
    draw, words = np.random.default_rng(0), sorted(STOP_WORDS)
    words += ["".join(random.Random(at).choices("aeioubcdfghklmnprstvw", k=3 + at % 8)) for at in range(200_000)]
    shares = np.cumsum(1 / np.arange(1, len(words) + 1))
    rows = []
    with path.open("w", encoding="utf-8") as file:
        file.write("id\ttext\ttitle\n")
        for number in range(count):
            drawn = [words[at] for at in np.searchsorted(shares, draw.random(102) * shares[-1])]
            row = (str(number + 1), " ".join(drawn[:100]), " ".join(drawn[100:]))
            file.write(f'{row[0]}\t"{row[1]}."\t{row[2]}\n')
            rows.append(row)
    return rows


def question(row: tuple[str, str, str]) -> str:
    return " ".join(["what", "is", "the", *random.Random(row[0]).sample(row[1].split(), 5), row[2]])


def kill(folder: Path, count: int) -> None:
    target = folder / "killed"
    process = subprocess.Popen([sys.executable, "-c", BUILD, folder / "corpus.tsv", target])
    record = folder / "killed.part" / RECORD_FILE
    while process.poll() is None:
        marked = json.loads(record.read_text()).get("marked", 0) if record.exists() else 0
        if marked >= count // 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    index = build_embedded(folder / "corpus.tsv", target)
    ids = [passage.id for passage in index.all_passages()]
    same = index.index_fingerprint() == EmbeddedIndex(folder / "index0").index_fingerprint()
    print(f"killed at {marked} and resumed: {len(ids)} passages, {len(set(ids))} different, same fingerprint: {same}")
    raise SystemExit(not (len(ids) == len(set(ids)) == count and same))


if __name__ == "__main__":
    main()
