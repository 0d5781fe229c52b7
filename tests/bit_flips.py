"""Single-bit flips in everything that Graftwork writes; each must be detected or harmless.

`python tests/bit_flips.py FLIPS SEED` builds a run, a gradient bank, an index and prepared files in a temporary folder,
flips bits in place, one at a time, and prints the number of detected, harmless and wrong ones by kind of file.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bank_writer import gradient
from bank_writer import open_bank as new_bank
from graftwork.core.config import to_plain
from graftwork.errors import GraftworkError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.topk import TopK
from graftwork.pipeline.answers import predict
from graftwork.pipeline.diagnosis import diagnose
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import evaluate_checkpoints
from graftwork.pipeline.training import train
from graftwork.reporting import render
from graftwork.reporting.picture import Picture
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.maintenance import verify_embedded
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import load_recipe
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.prepare import load_prepared, prepare
from tiny_models import tiny_model, word_tokenizer

ANSWERS = EvaluationSettings(max_new_tokens=2, batch_size=8)
PASSAGES = 40


@dataclass
class Area:
    """Files of one kind, and everything that a user can read from them."""

    folder: Path
    uses: dict[str, Callable[[], Any]]
    """Use by name; each returns what a user sees, without measured times."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Unchanged content by path below the folder."""
    expected: dict[str, Any] = field(default_factory=dict)

    def learn(self) -> Area:
        """Learn content and results of unchanged files; a second time must return the same."""
        for use in self.uses.values():
            use()
        self.files = {str(path.relative_to(self.folder)): path.read_bytes() for path in self.paths()}
        self.expected = self._results()
        again = self._results()
        different = [name for name in self.uses if self.expected[name] != again[name]]
        if different:
            raise ValueError(f"{', '.join(different)} of {self.folder} return something else the second time")
        return self

    def _results(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, use in self.uses.items():
            found[name] = use()
            self.restore()
        return found

    def paths(self) -> Iterator[Path]:
        return (path for path in sorted(self.folder.rglob("*")) if path.is_file())

    def restore(self) -> None:
        """Put back what the uses changed."""
        for path in list(self.paths()):
            if str(path.relative_to(self.folder)) not in self.files:
                path.unlink()
        for name, content in self.files.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                rewrite(path, content)


def rewrite(path: Path, content: bytes) -> None:
    """Replace a file by a new one; truncating one that an earlier index still maps would end the process (SIGBUS)."""
    changed = path.with_name(f"{path.name}.changed")
    changed.write_bytes(content)
    changed.replace(path)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one flip."""

    area: str
    file: str
    bit: int
    kind: str
    """detected, harmless or wrong."""
    detail: str = ""


def areas(folder: Path) -> dict[str, Area]:
    """Build all files in a folder."""
    made = {"run": _run(folder), "bank": _bank(folder), "index": _index(folder), "prepared": _prepared(folder)}
    return {name: area.learn() for name, area in made.items()}


def flips(found: dict[str, Area], count: int, seed: int) -> Iterator[Outcome]:
    """Flip bits, one at a time: a random file of a random area, and a random position in it."""
    draw = random.Random(seed)
    for _ in range(count):
        name = draw.choice(["run", "run", "run", *found])
        area = found[name]
        file = draw.choice([file for file, content in area.files.items() if content])
        bit = draw.randrange(8 * len(area.files[file]))
        yield Outcome(name, file, bit, *flip(area, file, bit))


def flip(area: Area, file: str, bit: int) -> tuple[str, str]:
    """Flip one bit, carry out every use, and restore the files."""
    content = bytearray(area.files[file])
    content[bit // 8] ^= 1 << bit % 8
    errors: list[str] = []
    wrong: list[str] = []
    for name, use in area.uses.items():
        rewrite(area.folder / file, bytes(content))
        try:
            if use() != area.expected[name]:
                wrong.append(f"{name} returns something else")
        except GraftworkError as error:
            errors.append(f"{name}: {type(error).__name__}")
        # anything else is what the script searches for
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        area.restore()
    if wrong:
        return "wrong", "; ".join(wrong)
    return ("detected", "; ".join(errors)) if errors else ("harmless", "")


def _run(folder: Path) -> Area:
    """A run of a tiny encoder–decoder after conversion, training, evaluation, prediction and report."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"input": f"w{n + 4} w{n + 5}", "target": f"w{n % 4 + 6}"}) + "\n" for n in range(8))
    )
    run = folder / "run"
    model = tiny_model("t5", dtype=torch.float32)
    save(convert(model, TopK(feed_forward_k=6), tokenizer=word_tokenizer()), run)
    settings = TrainingSettings(
        tasks=(str(rows),), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, validation=0.25
    )
    train(str(run), settings)
    answers = run / "predictions" / "own.jsonl"
    inputs = [f"w{n} w{n + 1}" for n in range(4, 9)]

    def answer() -> Any:
        return predict(load(run), inputs, ANSWERS, output=answers)

    def score() -> Any:
        return [_without_times(row) for row in evaluate(run, [str(rows)], settings=ANSWERS).rows]

    def score_checkpoint() -> Any:
        return [_without_times(row) for row in evaluate_checkpoints(run, "last", ANSWERS.__class__(**_on(rows))).rows]

    score()
    answer()
    with CheapPlots():
        render.report(run, formats=("md", "html"))
    uses = {
        "report": lambda: _report(run),
        "doctor --deep": lambda: _diagnosis(run),
        "evaluate": score,
        "predict": answer,
        "evaluate --checkpoints": score_checkpoint,
        "train": lambda: train(str(run), settings).phases,
        "run": lambda: to_plain(replace(load_recipe(run), versions={}, notes=())),
    }
    return Area(run, uses)


def _on(rows: Path) -> dict[str, Any]:
    return {"tasks": (str(rows),), "max_new_tokens": 2, "batch_size": 8}


def _without_times(row: Any) -> Any:
    return replace(row, seconds=0.0)


def _report(run: Path) -> str:
    with CheapPlots():
        files = render.report(run, formats=("md", "html"))
    return "\n".join(file.read_text() for file in files)


def _diagnosis(run: Path) -> Any:
    findings, healthy = diagnose(str(run), deep=True)
    if not healthy:
        raise GraftworkError("; ".join(entry["found"] for entry in findings if entry["state"] == "wrong"))
    return findings


class CheapPlots:
    """Replaces the plots of a report by the numbers that they are drawn from; drawing takes most of the time."""

    def __enter__(self) -> None:
        self.before = render.plots_of, render.training_plots_of
        render.plots_of = lambda results: {"numbers": Picture(repr(results.rows).encode())}
        render.training_plots_of = lambda results: {"curves": Picture(repr(results.curves).encode())}

    def __exit__(self, *error: object) -> None:
        render.plots_of, render.training_plots_of = self.before


def _bank(folder: Path) -> Area:
    """A gradient bank of two appends and a deletion."""
    with new_bank(folder / "bank") as bank:
        bank.append([gradient(number) for number in range(6)])
        bank.append([gradient(number) for number in range(6, 9)])
        bank.delete(["p3"])

    def read() -> Any:
        with GradientBank(folder / "bank", "a") as bank:
            found = bank.rows(sorted(bank.ids()))
            total = bank.sum(dict.fromkeys(found, 1.0))
            return {name: repr(row) for name, row in found.items()}, total.tolist()

    def check() -> Any:
        with GradientBank(folder / "bank", "r") as bank:
            found = verify(bank)
        if not found.whole:
            raise GraftworkError("; ".join((*found.bad_ids, *found.problems)))
        return found

    return Area(folder / "bank", {"read": read, "bank verify": check})


def _index(folder: Path) -> Area:
    """An embedded index after a deletion."""
    corpus = folder / "corpus.jsonl"
    rows = [
        {"_id": f"p{n}", "text": f"text number {n} with words {n % 7}", "title": f"title {n}"} for n in range(PASSAGES)
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_embedded(corpus, folder / "index").delete(["p3"])

    def search() -> Any:
        one = EmbeddedIndex(folder / "index")
        hits = one.search(["text words 3", "title 12 number"], 5)
        return len(one), one.index_fingerprint(), hits, sorted(one.all_passages(), key=lambda passage: passage.id)

    return Area(folder / "index", {"search": search, "index --verify": lambda: verify_embedded(folder / "index")})


def _prepared(folder: Path) -> Area:
    """Files of `graftwork prepare`."""
    source = folder / "raw" / "squad1_1"
    source.mkdir(parents=True)
    (source / "dev.tsv").write_text("".join(f"who is {n}? \\n about {n}\tname {n}\n" for n in range(12)))
    made = prepare(["squad1_1"], input=folder / "raw", output=folder / "prepared", weighted_to=24)
    paths = [path for path in (made.path, made.weighted_path) if path is not None]
    return Area(folder / "prepared", {"load": lambda: [load_prepared(path) for path in paths]})


def main() -> int:
    count, seed = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (500, 0)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(flips(areas(Path(folder)), count, seed))
    for (area, kind), number in sorted(Counter((one.area, one.kind) for one in outcomes).items()):
        print(f"{area:10} {kind:10} {number}")
    wrong = [one for one in outcomes if one.kind == "wrong"]
    for one in wrong:
        print(f"{one.area}/{one.file}, bit {one.bit}: {one.detail}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
