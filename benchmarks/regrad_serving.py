"""Time to first token and between tokens of the server's continuous batching, with static batches beside.

Expected: a question joins the running batch at its next token, so that the time to its first token is that of one
decoding step, its retrieval and its prompt. In static batches it waits until the slowest answer of the batch before is
complete, and all its text arrives at once. Both run the same questions with the same arrival times, each with a
separate update; most answers are short, and every fifth is long.

    python benchmarks/regrad_serving.py --model ../shared/models/stories260K --data ../shared/data --threads 1

The questions are submitted to the queue in this process, without HTTP.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from common import parser, prepare
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.encoding.encoder import PassageEncoder, encode_passages
from graftwork.methods.regrad.text.requests import Question
from graftwork.pipeline.loading import load_model
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.serving.queued_request import QueuedRequest
from graftwork.serving.request_queue import RequestQueue
from graftwork.serving.settings import ServeSettings
from graftwork.serving.telemetry import Telemetry
from graftwork.tasks import get_task

Asked = tuple[float, Question, int]
"""Arrival in seconds after the start, question, and limit of new tokens."""
Times = list[float]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="folder or hub id of a Llama")
    options.add_argument("--data", required=True, help="folder with popqa/ and dpr/psgs_w100.tsv")
    options.add_argument("--questions", type=int, default=64)
    options.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0, 16.0], help="arrivals per second")
    options.add_argument("--short", type=int, default=8, help="tokens of a short answer")
    options.add_argument("--long", type=int, default=128, help="tokens of every fifth answer")
    options.add_argument("--rank", type=int, default=4)
    chosen = options.parse_args()
    prepare(chosen)
    model, tokenizer = load_model(chosen.model, dtype=chosen.dtype)
    converted = convert(Converted(model.to(chosen.device), tokenizer=tokenizer), ReGrad(rank=chosen.rank, b_std=0.02))
    config: Any = converted.methods[-1].config
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        encoder = PassageEncoder(converted.model, converted.tokenizer, config)
        passages = list(islice(CorpusReader(find_corpus(Path(chosen.data) / "dpr" / "psgs_w100.tsv")), 24))
        bank = encoder.open_bank(Path(folder) / "bank")
        encode_passages(encoder, bank, passages)
        answerer = Answerer(converted.model, converted.tokenizer, bank, config=config)
        for rate in chosen.rates:
            asked = arrivals(chosen, passages, rate)
            for name, run in (("static", static), ("continuous", continuous)):
                rows.append({"arrivals_per_second": rate, "batches": name, **run(answerer, asked)})
    about = {"kind": "measured", "device": chosen.device, "threads": torch.get_num_threads(), "n": chosen.questions}
    if chosen.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\t".join(rows[0]))
    for row in rows:
        print("\t".join(map(str, row.values())))


def arrivals(chosen: argparse.Namespace, passages: Sequence[Any], rate: float) -> list[Asked]:
    """Questions with exponential gaps; all answers are verbatim, so that most reach their limit of tokens."""
    draw = random.Random(chosen.seed)
    texts = [row.input for row in get_task("multihop/popqa").load(Path(chosen.data), "dev").rows[: chosen.questions]]
    found: list[Asked] = []
    moment = 0.0
    for number, text in enumerate(texts):
        moment += draw.expovariate(rate)
        three = tuple(passages[(3 * number + rank) % len(passages)] for rank in range(3))
        found.append((moment, Question(text, three, verbatim=True), chosen.long if number % 5 == 4 else chosen.short))
    return found


def continuous(answerer: Answerer, asked: Sequence[Asked]) -> dict[str, float]:
    """Answer by the server's queue."""
    queue = RequestQueue(answerer, ServeSettings(batch_size=16, queue_size=len(asked)), Telemetry())
    queue.start()
    moments: list[Times] = [[] for _ in asked]
    requests = [
        QueuedRequest(answerer, question, tokens, listener=lambda _, own=own: own.append(time.monotonic()), top=0)
        for (_, question, tokens), own in zip(asked, moments, strict=True)
    ]
    began = time.monotonic()

    def submit(number: int) -> None:
        queue.submit([requests[number]])

    arrived = send(asked, submit, began)
    for one in requests:
        one.future.result()
    queue.close()
    return summary(arrived, moments, began)


def static(answerer: Answerer, asked: Sequence[Asked]) -> dict[str, float]:
    """Answer in batches of up to 16 waiting questions with equal limits; the next begins when all rows are complete."""
    waiting: list[int] = []
    moments: list[Times] = [[] for _ in asked]
    wake = threading.Condition()
    began = time.monotonic()

    def work() -> None:
        left = len(asked)
        while left:
            with wake:
                wake.wait_for(lambda: waiting)
                limit = asked[waiting[0]][2]
                batch = [number for number in waiting if asked[number][2] == limit][:16]
                waiting[:] = [number for number in waiting if number not in batch]
            updates = answerer.gradient_retriever.retrieve([asked[number][1] for number in batch])
            answers = answerer.generate(updates, max_new_tokens=limit)
            for number, answer in zip(batch, answers, strict=True):
                # the whole answer arrives at once
                moments[number] += [time.monotonic()] * answer.tokens
            left -= len(batch)

    thread = threading.Thread(target=work)
    thread.start()

    def submit(number: int) -> None:
        with wake:
            waiting.append(number)
            wake.notify()

    arrived = send(asked, submit, began)
    thread.join()
    return summary(arrived, moments, began)


def send(asked: Sequence[Asked], submit: Callable[[int], None], began: float) -> Times:
    """Submit every question at its time; return the times."""
    found: Times = []
    for number, (moment, _, _) in enumerate(asked):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        found.append(time.monotonic())
        submit(number)
    return found


def summary(arrived: Times, moments: Sequence[Times], began: float) -> dict[str, float]:
    """Milliseconds to the first token, between tokens, and to the last token of short answers; tokens per second."""
    first = [times[0] - start for start, times in zip(arrived, moments, strict=True)]
    between = [after - before for times in moments for before, after in pairwise(times)]
    short = min(map(len, moments))
    whole = [times[-1] - start for start, times in zip(arrived, moments, strict=True) if len(times) <= 2 * short]
    last = max(times[-1] for times in moments)
    return {
        **{f"first_token_ms_{name}": value for name, value in quantiles(first).items()},
        **{f"between_tokens_ms_{name}": value for name, value in quantiles(between).items()},
        **{f"short_answer_ms_{name}": value for name, value in quantiles(whole).items()},
        "tokens_per_second": round(sum(map(len, moments)) / (last - began), 1),
    }


def quantiles(values: Times) -> dict[str, float]:
    parts = statistics.quantiles(values, n=20)
    return {"p50": round(1000 * parts[9], 1), "p95": round(1000 * parts[18], 1)}


if __name__ == "__main__":
    main()
