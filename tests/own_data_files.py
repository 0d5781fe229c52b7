"""Small files in the formats of widely used data sets, with contents written for the tests."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

COLOURS = [("grass", "green"), ("snow", "white"), ("coal", "black"), ("a ruby", "red")]
FACTS = [(f"What is the colour of {thing}?", colour) for thing, colour in COLOURS]


def alpaca() -> list[dict[str, str]]:
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in FACTS]
    return [*rows, {"instruction": "Name the colour.", "input": "a lemon", "output": "yellow"}]


def sharegpt() -> list[dict[str, Any]]:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        first = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello, ask me."}]
        return [*first, {"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    return [{"id": f"c{n}", "conversations": turns(*fact)} for n, fact in enumerate(FACTS)]


def messages() -> list[dict[str, Any]]:
    def turns(question: str, answer: str) -> list[dict[str, Any]]:
        parts = [{"type": "text", "text": question}]
        system = {"role": "system", "content": "Answer in one word."}
        return [system, {"role": "user", "content": parts}, {"role": "assistant", "content": answer}]

    return [{"messages": turns(*fact)} for fact in FACTS]


def gsm8k() -> list[dict[str, str]]:
    text = "Tom has {n} boxes of 10 pens. How many pens has he?"
    return [
        {"question": text.format(n=n), "answer": f"{n} * 10 = <<{n}*10={n}0>>{n}0 pens.\n#### {n:,}0"}
        for n in (2, 3, 5, 100)
    ]


def squad(*, impossible: bool = False) -> dict[str, Any]:
    questions: list[dict[str, Any]] = [
        {"id": f"q{n}", "question": question, "answers": [{"text": answer, "answer_start": 0}] * 2}
        for n, (question, answer) in enumerate(FACTS)
    ]
    if impossible:
        questions.append({"id": "q9", "question": "Who painted it?", "answers": [], "is_impossible": True})
    passage = "Grass is green, snow is white, coal is black and a ruby is red."
    return {"version": "v2.0", "data": [{"title": "Colours", "paragraphs": [{"context": passage, "qas": questions}]}]}


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(header: list[str], rows: list[tuple[str, ...]], delimiter: str = ",") -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([header, *rows])
    return buffer.getvalue().encode()


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    """Content by file name; the names do not decide the format."""
    import pyarrow

    questions = [question for question, _ in FACTS]
    answers = [answer for _, answer in FACTS]
    return {
        "alpaca_data.json": json.dumps(alpaca(), indent=2).encode(),
        "sharegpt.json": json.dumps(sharegpt()).encode(),
        "messages.jsonl.gz": gzip.compress(json_lines(messages())),
        "gsm8k.jsonl": json_lines(gsm8k()),
        "gsm8k.jsonl.bz2": bz2.compress(json_lines(gsm8k())),
        "gsm8k.jsonl.xz": lzma.compress(json_lines(gsm8k())),
        "gsm8k.jsonl.zst": pyarrow.compress(json_lines(gsm8k()), "zstd", asbytes=True),
        "dev-v1.1.json": json.dumps(squad()).encode(),
        "dev-v2.0.json": json.dumps(squad(impossible=True)).encode(),
        "questions.parquet": parquet({"question": questions, "answer": answers}),
        "prompts.jsonl": json_lines([{"prompt": q, "completion": a} for q, a in FACTS]),
        "reviews.csv": table(["text", "label"], [("A fine, warm film.", "good"), ("Dull.", "bad")]),
        "faq.csv": table(["ask", "reply", "also"], [(q, a, f"it is {a}") for q, a in FACTS]),
    }


def write_files(folder: Path) -> dict[str, Path]:
    """Write all files and return their paths by name."""
    for name, content in files().items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files()}
