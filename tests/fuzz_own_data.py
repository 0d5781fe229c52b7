"""A small valid input for every format of users' own data, which `fuzz_readers` mutates."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fuzz_reader import Reader, dump, dump_lines, lines_of
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.tasks.inputs import read_inputs
from graftwork.tasks.loading import load_tasks


def own(path: Path, fields: DataFields) -> int:
    found = quietly(load_tasks, [str(path)], None, "train", 0, fields=fields)
    return sum(len(examples.rows) + examples.ignored for _, examples in found)


def quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function without its lines on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments, **options)


def own_readers() -> dict[str, Reader]:
    """Readers of users' own data by name."""

    def reader(file: str, content: bytes, count: Callable[[bytes], int | None] | None = None, **fields: Any) -> Reader:
        return Reader(file, content, lambda path: own(path, DataFields(**fields)), records=count)

    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    lines = dump_lines([{"question": "q", "answer": "1+1=2\n#### 2"}] * 3)
    squad = {"context": "a b", "qas": [{"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]}]}
    choices = [{"label": "A", "text": "one"}, {"label": "B", "text": "two"}]
    columns = {"q": ["a", "b"], "n": [{"x": ["c"]}, {"x": ["d", "e"]}]}
    return {
        "own_alpaca": reader("a.json", dump([{"instruction": "i", "input": "", "output": "o"}] * 3), items_or_none),
        "own_sharegpt": reader("s.json", dump([{"id": "1", "conversations": turns, "system": "s"}] * 3), items_or_none),
        "own_messages": reader("m.jsonl", dump_lines([{"messages": messages}] * 3), lines_of),
        "own_prompts": reader("p.jsonl", dump_lines([{"prompt": messages[:1], "completion": "c"}] * 3), lines_of),
        "own_gsm8k": reader("g.jsonl", lines, lines_of),
        "own_squad": reader("q.json", dump({"data": [{"title": "t", "paragraphs": [squad]}]})),
        "own_choices": reader(
            "c.jsonl", dump_lines([{"question": "q", "choices": choices, "answerKey": "A"}] * 3), lines_of
        ),
        "own_mapped": reader(
            "x.csv", b'ask,reply\n"a, b",c\nd,e\n', csv_lines, input_template="Q: {ask}", target_field=("reply",)
        ),
        "own_parquet": reader("x.parquet", parquet(columns), input_field="q", target_field=("n.x",)),
        "own_gz": reader("x.jsonl.gz", gzip.compress(lines)),
        "own_bz2": reader("x.jsonl.bz2", bz2.compress(lines)),
        "own_xz": reader("x.jsonl.xz", lzma.compress(lines)),
        "own_zst": reader("x.jsonl.zst", pyarrow.compress(lines, "zstd", asbytes=True)),
        "own_inputs": Reader(
            "i.json",
            dump([{"instruction": "i"}] * 3),
            lambda path: len(quietly(read_inputs, path, EvaluationSettings())),
            records=items_or_none,
        ),
    }


def items_or_none(content: bytes) -> int | None:
    """Number of items of a JSON array; None for content that is read in another format."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        return None
    return len(value) if isinstance(value, list) else None


def csv_lines(content: bytes) -> int:
    """Number of rows of a CSV file without its blank lines."""
    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    return sum(bool(row) for row in csv.reader(io.StringIO(text, newline=""))) - 1


def parquet(columns: dict[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()
