"""A million passages on disk: build rate, questions per second, memory, and hits equal to an unpruned search.

Passages are made from the real ones of a Wikipedia extract: each joins two windows of words from two of them, with the
title of the first, so that frequencies of words are those of real text. Questions are those of PopQA and HotpotQA. One
question at a time, one thread.

    python benchmarks/retrieval_million.py ../shared/data --passages 1000000 --folder /tmp/million
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded


def write_corpus(source: Path, path: Path, count: int) -> None:
    with source.open(encoding="utf-8") as file:
        real = [(row["title"], row["text"].split()) for row in csv.DictReader(file, delimiter="\t")]
    draw = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words: list[str] = []
            first, second = draw.integers(len(real), size=2)
            for chosen in (first, second):
                text = real[chosen][1]
                start = int(draw.integers(max(1, len(text) - 50)))
                words += text[start : start + 50]
            file.write(json.dumps({"id": str(number), "title": real[first][0], "text": " ".join(words)}) + "\n")


def questions(data: Path, count: int) -> list[str]:
    with (data / "popqa" / "popQA.tsv").open(encoding="utf-8") as file:
        found = [row["question"] for row in csv.DictReader(file, delimiter="\t")]
    names = (
        "hotpotqa/hotpot_dev_distractor_v1.json",
        "hotpotqa/hotpot_train_v1.1.json",
        "2wikimultihopqa/dev.json",
        "2wikimultihopqa/train.json",
        "complexwebquestions/ComplexWebQuestions_train.json",
    )
    for name in names:
        found += [row["question"] for row in json.loads((data / name).read_text(encoding="utf-8"))]
    return list(dict.fromkeys(found))[:count]


def seconds_each(index: EmbeddedIndex, asked: Sequence[str], k: int) -> list[float]:
    spent = []
    for question in asked:
        # processor time, because a search has one thread and other work on the machine does not count
        start = time.process_time()
        index.search([question], k)
        spent.append(time.process_time() - start)
    return spent


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path, help="folder with dpr, popqa and hotpotqa")
    options.add_argument("--passages", type=int, default=1_000_000)
    options.add_argument("--questions", type=int, default=2000)
    options.add_argument("--folder", type=Path, required=True, help="where corpus and index are kept")
    chosen = options.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    corpus, folder = chosen.folder / "corpus.jsonl", chosen.folder / "index"
    if not folder.exists():
        write_corpus(chosen.data / "dpr" / "psgs_w100.tsv", corpus, chosen.passages)
        before, wall, cpu = megabytes(), time.perf_counter(), time.process_time()
        build_embedded(corpus, folder)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(
            f"build: {chosen.passages / wall:.0f} passages/s wall, {chosen.passages / cpu:.0f} of processor time; "
            f"peak memory +{megabytes() - before:.0f} MB; {size / 1e6:.0f} MB on disk",
            flush=True,
        )
    index = EmbeddedIndex(folder, threads=1)
    print(f"{len(index)} passages", flush=True)
    asked = questions(chosen.data, chosen.questions)
    pruned = index.prune_from
    for k in (3, 10, 100):
        rates: dict[str, float] = {}
        # in turns, so that both meet the same load of the machine
        times: dict[str, list[float]] = {"every passage": [], "pruned": []}
        for start in range(0, len(asked), 100):
            for name, limit in (("every passage", len(index) + 1), ("pruned", pruned)):
                index.prune_from = limit
                times[name] += seconds_each(index, asked[start : start + 100], k)
        for name, spent in times.items():
            rates[name] = 1 / statistics.mean(spent)
            print(
                f"{k} hits, {name}: {rates[name]:.0f} questions/s of processor time, "
                f"median {1e3 * statistics.median(spent):.2f} ms, "
                f"95 % within {1e3 * sorted(spent)[int(0.95 * len(spent))]:.2f} ms",
                flush=True,
            )
        different = 0
        for question in asked:
            both = []
            for limit in (len(index) + 1, pruned):
                index.prune_from = limit
                both.append([(hit.id, hit.score) for hit in index.search([question], k)[0]])
            different += both[0] != both[1]
        print(f"{k} hits: {different} of {len(asked)} questions with other hits or scores", flush=True)
    print(f"peak memory {megabytes():.0f} MB")


if __name__ == "__main__":
    main()
