"""Commands that write, with their inputs and their results, for the injection of faults.

Each command runs in a folder of its own with relative paths. Results are compared between interrupted and uninterrupted
runs; what depends on time or on the number of attempts is not part of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftwork.core.commits import complete
from tiny_models import tiny_model, word_tokenizer

TRAINING = (
    "train run --task rows.jsonl --per-device-train-batch-size 4 --learning-rate 1e-2 --logging-steps 1 --save-steps 2 "
    "--max-input-tokens 12 --max-target-tokens 4"
)
EVALUATION = "--task rows.jsonl --batch-size 4 --max-input-tokens 12 --max-new-tokens 2"


@dataclass(frozen=True)
class Scenario:
    """One command that writes."""

    command: str
    prepare: Callable[[Path], None]
    """Writes the inputs into an empty folder."""
    read: Callable[[Path], Any]
    """Results that interrupted and uninterrupted runs have in common, as JSON values."""
    usable: Callable[[Path], None]
    """Raises an error if an interrupted run has left something that cannot be used."""
    points: frozenset[str]
    """Points that the command reaches."""
    patches: Mapping[str, Any] = field(default_factory=dict)
    """Module attributes by dotted path, such as smaller batches, so that a tiny input has several commits."""
    finished: str | None = None
    """Part of the error if the command is repeated although the killed process had finished its work."""


class CommandError(Exception):
    """A command did not end with exit code 0."""


def graftwork(folder: Path, command: str) -> str:
    """Run a command line in a folder; return its output."""
    from graftwork.cli.app import run

    before = Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = run([word.replace("%", " ") for word in command.split()])
    finally:
        os.chdir(before)
    if code:
        raise CommandError(f"graftwork {command}\n  ended with {code}: {err.getvalue().strip()[-2000:]}")
    return out.getvalue()


def rows(folder: Path, count: int = 8) -> None:
    lines = [{"input": f"w{n + 4} w{n + 20} w9", "target": f"w{n % 4 + 5}"} for n in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def model(folder: Path, family: str) -> None:
    tiny_model(family, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    tokenizer.save_pretrained(folder / "model")


def checkpoint(folder: Path) -> None:
    rows(folder)
    model(folder, "t5")


def converted(folder: Path) -> None:
    checkpoint(folder)
    graftwork(folder, "convert topk model -o run --feed-forward-k 6")


def trained(folder: Path) -> None:
    converted(folder)
    graftwork(folder, f"{TRAINING} --max-steps 4")


def evaluated(folder: Path) -> None:
    trained(folder)
    graftwork(folder, f"evaluate run {EVALUATION} --baseline")


def sparse(folder: Path) -> None:
    model(folder, "roberta")
    (folder / "wiki").mkdir()
    lines = [" ".join(f"w{(7 * n + 3 * m) % 60 + 4}" for m in range(12)) for n in range(12)]
    for split in ("train", "valid"):
        (folder / "wiki" / f"wiki.{split}.raw").write_text("".join(f" {line} \n \n" for line in lines))
    graftwork(
        folder,
        "convert sparsefinder model -o run --alpha 1.5 --grouping kmeans --rounds 2 --hidden-size 4 --num-clusters 2 "
        "--projection-batch-size 8 --projection-learning-rate 0.01 --samples 10 --cluster-rounds 1",
    )


def recipe(folder: Path) -> None:
    checkpoint(folder)
    (folder / "recipe.yaml").write_text(
        "model: model\nmethod: {name: topk, feed_forward_k: 6}\n"
        "over: {method.feed_forward_k: [4, 6, null]}\n"
        "evaluate: {tasks: [rows.jsonl], batch_size: 4, max_input_tokens: 12, max_new_tokens: 2}\n"
    )


def trained_recipe(folder: Path) -> None:
    checkpoint(folder)
    (folder / "recipe.yaml").write_text(
        "model: model\nmethod: {name: topk, feed_forward_k: 6}\nover: {train.learning_rate: [0.01, 0.02]}\n"
        "train: {tasks: [rows.jsonl], per_device_train_batch_size: 4, max_steps: 2, save_steps: 1, logging_steps: 1,"
        " max_input_tokens: 12, max_target_tokens: 4}\n"
        "evaluate: {tasks: [rows.jsonl], batch_size: 4, max_input_tokens: 12, max_new_tokens: 2}\n"
    )


def raw(folder: Path) -> None:
    for number, name in enumerate(("squad1_1", "boolq")):
        (folder / "data" / name).mkdir(parents=True)
        lines = [f"who has pet {n}? \\n name{n + number} has pet {n} .\tname{n + number}\n" for n in range(40)]
        (folder / "data" / name / "train.tsv").write_text("".join(lines))


def corpus(folder: Path) -> None:
    passages(folder / "corpus.tsv", range(60))


def passages(file: Path, numbers: range, last: str = "w9") -> None:
    """Write passages of four words, with a number as id."""
    lines = [f"p{n}\tw{n % 50 + 4} w{n % 7 + 9} w{n % 11 + 20} {last}\tw{n % 50 + 5}\n" for n in numbers]
    file.write_text("id\ttext\ttitle\n" + "".join(lines))


def indexed(folder: Path) -> None:
    corpus(folder)
    graftwork(folder, "index corpus.tsv -o index")


def adapted(folder: Path) -> None:
    model(folder, "llama")
    passages(folder / "corpus.tsv", range(12))
    graftwork(folder, "convert regrad model -o run --rank 2 --layers 0,1")


def banked(folder: Path) -> None:
    adapted(folder)
    graftwork(folder, "bank build run corpus.tsv -o bank --batch-size 4")
    graftwork(folder, "index corpus.tsv -o index")
    # four passages with new texts and four new passages
    passages(folder / "more.tsv", range(8, 16), "w10")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Names of files and folders that only exist during a change."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name.endswith((".part", ".old", ".commit")) or path.name.startswith(".commit")
    )


def read_run(folder: Path) -> Any:
    """Model, logs, results and predictions of a run, and of the runs in it."""
    found: dict[str, Any] = {"left": leftovers(folder)}
    for path in sorted((folder / "run").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = digest(path)
        elif path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: line[k] for k in ("step", "loss", "grad_norm") if k in line} for line in lines]
        elif path.suffix == ".jsonl" or path.name in ("conversion.json", "centroids.json", "settings.json"):
            found[name] = path.read_text().splitlines()
        elif path.name in ("results.json", "best.json"):
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name == "graftwork.json":
            manifest = json.loads(path.read_text())
            found[name] = [manifest["digest"], sorted(manifest["files"]), sorted(manifest.get("training", ()))]
        elif path.name == "run.yaml":
            text = path.read_text().replace(str(folder.resolve()), "")
            # the digest covers the path of the folder
            found[name] = [line for line in text.splitlines() if not line.startswith("# sha256 ")]
    return found


def without_times(value: Any) -> Any:
    """Results without durations, the mean loss, which covers only the last attempt, and the digest of all of them."""
    if isinstance(value, dict):
        omitted = ("second", "runtime", "train_loss", "sha256")
        names = [name for name in value if not any(word in name for word in omitted)]
        return {name: without_times(value[name]) for name in names}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def run_usable(folder: Path) -> None:
    """The run has its old or its new model, and every file in it is readable."""
    from graftwork.core.config import read_yaml
    from graftwork.core.files import read_json
    from graftwork.pipeline.loading import load

    run = folder / "run"
    complete(run)
    if (run / "model").exists():
        load(run)
        read_yaml(run / "run.yaml")
    for path in run.rglob("*.json"):
        if "checkpoint-" not in path.as_posix():
            read_json(path)


def read_report(folder: Path) -> Any:
    found = {path.name: path.read_text() for path in sorted((folder / "run").glob("report.*"))}
    pages = {path.name: path.read_text() for path in sorted((folder / "run").glob("*.html"))}
    return {"left": leftovers(folder), **found, **pages}


def read_prepared(folder: Path) -> Any:
    return {"left": leftovers(folder), **{path.name: digest(path) for path in sorted((folder / "out").iterdir())}}


def prepared_usable(folder: Path) -> None:
    """Files that exist are complete."""
    for path in (folder / "out").glob("*.jsonl"):
        lines = path.read_text().splitlines()
        assert len([json.loads(line) for line in lines]) == {"combined": 80, "weighted": 160}[path.stem.split("_")[0]]


def read_index(folder: Path) -> Any:
    from graftwork.retrieval.embedded import EmbeddedIndex
    from graftwork.retrieval.maintenance import verify_embedded

    verify_embedded(folder / "index")
    index = EmbeddedIndex(folder / "index", threads=1)
    # several segments, and passages that are deleted but not merged, change the statistics behind the scores
    hits = {query: sorted(hit.id for hit in index.search([query], 100)[0]) for query in ("w5 w9", "w20", "w10")}
    texts = sorted((passage.id, passage.title, passage.text) for passage in index.all_passages())
    return {"left": leftovers(folder), "hits": hits, "passages": texts, "fingerprint": index.index_fingerprint()}


def index_usable(folder: Path) -> None:
    """The index is complete, or an unfinished first build."""
    from graftwork.retrieval.embedded import EmbeddedIndex
    from graftwork.retrieval.retriever import IncompleteIndexError

    if (folder / "index").exists():
        EmbeddedIndex(folder / "index")
    elif (folder / "index.part" / "index.json").exists():
        try:
            EmbeddedIndex(folder / "index")
        except IncompleteIndexError:
            return
        raise AssertionError("an unfinished build was opened as an index")


def read_bank(folder: Path) -> Any:
    from graftwork.methods.regrad.bank.check import verify
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank

    with GradientBank(folder / "bank") as bank:
        found = verify(bank)
        assert found.whole, found
        ids = bank.ids()
        values = bank.get(ids).numpy()
        gradients = {name: hashlib.sha256(row.tobytes()).hexdigest() for name, row in zip(ids, values, strict=True)}
        return {"left": leftovers(folder), "gradients": gradients, "records": found.records}


def bank_usable(folder: Path) -> None:
    """The bank is whole, or has not been created."""
    from graftwork.methods.regrad.bank.files import holds_bank

    if holds_bank(folder / "bank"):
        read_bank(folder)


def read_bank_and_index(folder: Path) -> Any:
    return {**read_index(folder), **read_bank(folder)}


def both_usable(folder: Path) -> None:
    """Bank and index are whole, and contain the same passages once a change is completed."""
    from graftwork.methods.regrad.bank.changes import complete as complete_change
    from graftwork.methods.regrad.bank.files import text_key
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.config import ReGradConfig
    from graftwork.methods.regrad.text.prompting import document_text
    from graftwork.retrieval.embedded import EmbeddedIndex

    bank_usable(folder)
    index_usable(folder)
    index = EmbeddedIndex(folder / "index")
    template = ReGradConfig().document_template
    with GradientBank(folder / "bank") as bank:
        complete_change(bank, index)
        indexed = {one.id: text_key(document_text(template, one.title, one.text)) for one in index.all_passages()}
        assert indexed == bank.keys(bank.ids())


FILES = frozenset({"file.written", "file.replaced"})
LINES = frozenset({"line.append", "line.appended"})
COMMITS = frozenset({"commit.staged", "commit.made", "commit.moved", "model.weights", "model.saved"})
TRAINS = (
    FILES
    | LINES
    | COMMITS
    | {
        "training.loss",
        "training.gradients",
        "checkpoint.weights",
        "checkpoint.optimizer",
        "checkpoint.complete",
        "training.ended",
        "training.trained",
        "training.committed",
    }
)
PREDICTS = FILES | LINES | {"prediction.weights", "prediction.cleared"}
BANK = FILES | {"bank.gradients", "bank.records", "bank.ids", "bank.synced", "bank.committed"}
INDEX_CHANGE = frozenset({"index.pending", "index.changed"})
SMALL_COMMITS = {
    "graftwork.methods.regrad.bank.writing.COMMIT_BYTES": 1,
}

SCENARIOS: Mapping[str, Scenario] = {
    "train": Scenario(f"{TRAINING} --max-steps 4", converted, read_run, run_usable, TRAINS),
    "train_lora": Scenario(
        f"{TRAINING} --max-steps 4 --set train.lora.r=2 --set train.lora.target_modules=[q,v]",
        converted,
        read_run,
        run_usable,
        TRAINS,
    ),
    "train_collecting": Scenario(
        "train run --task wikitext/103_raw --data wiki --num-train-epochs 1 --per-device-train-batch-size 4 "
        "--max-input-tokens 16 --logging-steps 1 --save-steps 1 --max-steps 2",
        sparse,
        read_run,
        run_usable,
        TRAINS | {"shard.written", "shard.replaced", "centroids.written", "centroids.replaced"},
    ),
    "train_again": Scenario(
        f"{TRAINING.replace('1e-2', '2e-2')} --max-steps 2 --overwrite",
        trained,
        read_run,
        run_usable,
        TRAINS | {"claim.removed"},
    ),
    "convert": Scenario(
        "convert topk model -o run --feed-forward-k 6", checkpoint, read_run, run_usable, FILES | COMMITS
    ),
    "convert_again": Scenario(
        "convert topk model -o run --feed-forward-k 4 --overwrite",
        evaluated,
        read_run,
        run_usable,
        FILES | COMMITS | {"commit.removed"},
    ),
    "sweep": Scenario("run recipe.yaml -o run", recipe, read_run, run_usable, PREDICTS),
    "sweep_training": Scenario("run recipe.yaml -o run", trained_recipe, read_run, run_usable, TRAINS | PREDICTS),
    "sweep_checkpoints": Scenario(
        f"evaluate run {EVALUATION} --checkpoints best", trained, read_run, run_usable, PREDICTS
    ),
    "report": Scenario("report run", evaluated, read_report, run_usable, FILES),
    "prepare": Scenario(
        "prepare squad1_1 boolq --input data --output out --split train --weighted-to 80",
        raw,
        read_prepared,
        prepared_usable,
        FILES,
    ),
    "index": Scenario(
        "index corpus.tsv -o index",
        corpus,
        read_index,
        index_usable,
        FILES | {"index.marked", "index.built", "folder.complete", "folder.moved", "folder.swapped"},
        {"graftwork.retrieval.embedded.build_embedded.__kwdefaults__": {"overwrite": False, "commit_passages": 20}},
        "Found a finished index in index",
    ),
    "index_again": Scenario(
        "index corpus.tsv -o index --overwrite",
        indexed,
        read_index,
        index_usable,
        FILES | {"index.built", "folder.complete", "folder.moved", "folder.swapped"},
    ),
    "index_add": Scenario("index more.tsv -o index --add", banked, read_index, index_usable, FILES | INDEX_CHANGE),
    "bank_build": Scenario(
        "bank build run corpus.tsv -o bank --batch-size 4",
        adapted,
        read_bank,
        bank_usable,
        BANK | {"bank.datasets", "bank.recorded", "bank.compacted", "bank.cleaned"},
        SMALL_COMMITS,
    ),
    "bank_add": Scenario(
        "bank add bank run more.tsv --replace --index index --batch-size 4",
        banked,
        read_bank_and_index,
        both_usable,
        BANK | INDEX_CHANGE | {"change.recorded", "change.first", "change.both"},
        SMALL_COMMITS,
    ),
    "bank_delete": Scenario(
        "bank delete bank p1 p2 --index index",
        banked,
        read_bank_and_index,
        both_usable,
        FILES | INDEX_CHANGE | {"bank.synced", "bank.committed", "change.recorded", "change.first", "change.both"},
    ),
}
"""By name; those without an underscore, `train_lora`, `bank_build` and `bank_add` are also killed at random moments."""

RANDOM = ("train", "train_lora", "convert", "sweep", "report", "prepare", "index", "bank_build", "bank_add")
"""Scenarios that are killed at random moments."""
