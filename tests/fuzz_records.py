"""A small valid input for every reader of signed records and of the settings of a run, which `fuzz_readers` mutates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_inputs import settings
from fuzz_reader import Reader
from graftwork.methods.regrad.bank.backends import LocalBackend
from graftwork.methods.regrad.bank.files import CommitRecord, Manifest
from graftwork.methods.regrad.bank.layout import Layout
from graftwork.retrieval.index_storage import read_record, write_record
from graftwork.settings.recipe import RunConfig

RUN = b"""
model: m
method: {name: topk, attention_k: 64}
train: {tasks: [a], max_steps: 5}
over: {method.attention_k: [1, 2]}
seed: 1
versions: {torch: '2'}
notes: [a note]
"""


def written(write: Callable[[Path], Any]) -> bytes:
    """Content of the only JSON file that a function writes into an empty folder, on one line."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        (file,) = Path(folder).glob("*.json")
        return json.dumps(json.loads(file.read_bytes())).encode()


def index_record(folder: Path) -> None:
    write_record(folder, {"count": 2, "source": {"files": ["a.tsv"], "digest": "0f"}, "complaints": ["a.tsv, line 3"]})


def bank_manifest(folder: Path) -> None:
    layout = Layout.of([("a", (2, 3)), ("b", (3, 2))])
    Manifest({"model": "m"}, layout, "float32", {"step_sizes": [0.5]}).write(LocalBackend(folder))


def bank_commit(folder: Path) -> None:
    CommitRecord(1, 2, 3, 4, "0f").write(LocalBackend(folder))


def record_readers() -> dict[str, Reader]:
    """Readers of records by name."""
    return {
        "run": Reader("run.yaml", RUN, settings(RunConfig)),
        "index_record": Reader("index/index.json", written(index_record), lambda path: read_record(path.parent)),
        "bank": Reader("bank/bank.json", written(bank_manifest), lambda path: Manifest.read(LocalBackend(path.parent))),
        "commit": Reader(
            "bank/seal.json", written(bank_commit), lambda path: CommitRecord.read(LocalBackend(path.parent))
        ),
    }
