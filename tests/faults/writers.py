"""Writers of the library as short calls, for full and read-only disks at every point."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bank_writer import gradient, open_bank
from faults.scenarios import model, rows, sparse
from graftwork.core.commits import complete, staged
from graftwork.core.files import append_line, read_json, read_lines, recover_folder, swap_folder, write_json
from graftwork.core.run_folder import RunFolder
from graftwork.evaluation.prediction import predict_texts
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save, write_model
from graftwork.methods.regrad.bank import changes
from graftwork.methods.regrad.bank.files import holds_bank, text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load
from graftwork.pipeline.training import train
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.retriever import Passage
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.inputs import read_inputs


@dataclass(frozen=True)
class Writer:
    """One change that is visible completely or not at all."""

    prepare: Callable[[Path], None]
    write: Callable[[Path], None]
    """Makes the change; can be repeated."""
    read: Callable[[Path], Any]
    """State of the folder, before or after the change."""
    points: tuple[str, ...]
    """Points that this writer tests."""
    in_turn: bool = False
    """True to try one point after the other in one folder, each after resuming what the one before interrupted."""


def nothing(folder: Path) -> None:
    """Prepare nothing."""


def old_value(folder: Path) -> None:
    write_json(folder / "x.json", "old")


def write_value(folder: Path) -> None:
    write_json(folder / "x.json", "new")


def read_value(folder: Path) -> Any:
    return read_json(folder / "x.json")


def write_line(folder: Path) -> None:
    # as resumable writers do, which skip what they have
    if not list(read_lines(folder / "x.jsonl")):
        append_line(folder / "x.jsonl", {"a": 1})


def read_lines_of(folder: Path) -> Any:
    return list(read_lines(folder / "x.jsonl"))


def old_folder(folder: Path) -> None:
    (folder / "x").mkdir()
    write_json(folder / "x" / "value.json", "old")


def write_folder(folder: Path) -> None:
    recover_folder(folder / "x")
    write_json(folder / "x.new" / "value.json", "new")
    swap_folder(folder / "x.new", folder / "x")


def read_folder(folder: Path) -> Any:
    recover_folder(folder / "x")
    return read_json(folder / "x" / "value.json")


def committed(folder: Path) -> None:
    write_json(folder / "results.json", "old")
    write_json(folder / "run.yaml", "old")
    old_folder(folder)


def commit(folder: Path) -> None:
    with staged(folder, remove=["results.json"]) as new:
        write_json(new / "run.yaml", "new")
        old_folder(new)
        write_json(new / "x" / "value.json", "new")


def read_commit(folder: Path) -> Any:
    complete(folder)
    return [read_json(folder / "run.yaml"), read_folder(folder), (folder / "results.json").exists()]


def saved(folder: Path) -> None:
    model(folder, "t5")
    save(convert(load(folder / "model"), TopK(feed_forward_k=6)), folder / "run")
    rows(folder, 4)


def write_other_model(folder: Path) -> None:
    write_model(convert(load(folder / "model"), TopK(feed_forward_k=4)), RunFolder(folder / "run"))


def read_methods(folder: Path) -> Any:
    complete(folder / "run")
    manifest = read_json(folder / "run" / "model" / "graftwork.json")
    return [manifest["methods"], read_json(folder / "run" / "conversion.json")["digest"], load(folder / "run").digest()]


def settings(folder: Path, rate: float) -> TrainingSettings:
    return TrainingSettings(
        tasks=(str(folder / "rows.jsonl"),),
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=rate,
        max_input_tokens=8,
        max_target_tokens=4,
    )


def write_training(folder: Path) -> None:
    train(folder / "run", settings(folder, 1e-2))


def trained(folder: Path) -> None:
    saved(folder)
    write_training(folder)


def write_training_again(folder: Path) -> None:
    train(folder / "run", settings(folder, 2e-2), overwrite=True)


def write_sparse_training(folder: Path) -> None:
    chosen = TrainingSettings(
        tasks=("wikitext/103_raw",), max_steps=1, per_device_train_batch_size=4, max_input_tokens=16
    )
    train(folder / "run", chosen, data=folder / "wiki")


def predict(folder: Path) -> None:
    inputs = list(read_inputs(folder / "rows.jsonl", EVALUATION))
    predict_texts(load(folder / "run"), inputs, EVALUATION, output=folder / "out.jsonl")


EVALUATION = EvaluationSettings(max_new_tokens=2, max_input_tokens=8, batch_size=2)


def predicted_otherwise(folder: Path) -> None:
    """Predictions with another cache key, which are discarded."""
    saved(folder)
    (folder / "out.jsonl").write_text(json.dumps({"row": 0, "prediction": "old"}) + "\n")
    write_json(folder / "out.settings.json", {})


def read_predictions(folder: Path) -> Any:
    found = list(read_lines(folder / "out.jsonl"))
    # predictions with another cache key, and fewer predictions than inputs, are not used
    valid = "weights" in read_json(folder / "out.settings.json") and len(found) == 4
    return [row["prediction"] for row in found] if valid else None


def create_bank(folder: Path) -> None:
    open_bank(folder / "bank")


def read_bank(folder: Path) -> Any:
    if not holds_bank(folder / "bank"):
        return None
    with GradientBank(folder / "bank") as bank:
        return bank.get(bank.ids()).tolist()


def filled_bank(folder: Path) -> None:
    open_bank(folder / "bank").append([gradient(1), gradient(2)])


def append(folder: Path) -> None:
    open_bank(folder / "bank").append([gradient(3), gradient(4)])


def deleted_from(folder: Path) -> None:
    filled_bank(folder)
    append(folder)
    open_bank(folder / "bank").delete(["p1"])


def compact(folder: Path) -> None:
    open_bank(folder / "bank").compact()


def corpus(folder: Path) -> None:
    lines = [f"p{n}\ttext {n}\tt\n" for n in range(6)]
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(lines))


def build_index(folder: Path) -> None:
    build_embedded(folder / "corpus.tsv", folder / "index", overwrite=True, commit_passages=3)


def built(folder: Path) -> None:
    corpus(folder)
    build_index(folder)


def read_index(folder: Path) -> Any:
    recover_folder(folder / "index")
    if not (folder / "index").exists():
        return None
    return sorted((one.id, one.text) for one in EmbeddedIndex(folder / "index").all_passages())


def change_index(folder: Path) -> None:
    EmbeddedIndex(folder / "index").add([Passage("p1", "other text"), Passage("p9", "new text")])


def banked(folder: Path) -> None:
    built(folder)
    open_bank(folder / "bank").append([gradient(number) for number in range(6)])


def change_both(folder: Path) -> None:
    bank, index = open_bank(folder / "bank"), EmbeddedIndex(folder / "index")
    new = [replace(gradient(1), text="other text"), gradient(9)]
    passages = {one.id: (Passage(one.id, one.text), text_key(one.text)) for one in new}
    with changes.added(bank, index, passages):
        bank.append(new, replace=True)


def delete_both(folder: Path) -> None:
    changes.delete(open_bank(folder / "bank"), EmbeddedIndex(folder / "index"), ["p1", "p2"])


def read_both(folder: Path) -> Any:
    index = EmbeddedIndex(folder / "index")
    with GradientBank(folder / "bank") as bank:
        changes.complete(bank, index)
        keys = bank.keys(bank.ids())
        assert {one.id: text_key(one.text) for one in index.all_passages()} == keys
        return sorted(keys.items())


def read_centroids(folder: Path) -> Any:
    complete(folder / "run")
    return load(folder / "run").digest()


WRITERS = {
    "file": Writer(
        lambda folder: write_json(folder / "x.json", "old"), write_value, read_value, ("file.written", "file.replaced")
    ),
    "line": Writer(nothing, write_line, read_lines_of, ("line.append", "line.appended")),
    "folder": Writer(old_folder, write_folder, read_folder, ("folder.complete", "folder.moved", "folder.swapped")),
    "commit": Writer(
        committed, commit, read_commit, ("commit.staged", "commit.made", "commit.removed", "commit.moved")
    ),
    "model": Writer(saved, write_other_model, read_methods, ("model.weights", "model.saved")),
    "training": Writer(
        saved,
        write_training,
        read_methods,
        (
            "training.loss",
            "training.gradients",
            "checkpoint.weights",
            "checkpoint.optimizer",
            "checkpoint.complete",
            "training.ended",
            "training.trained",
            "training.committed",
        ),
        in_turn=True,
    ),
    "other training": Writer(trained, write_training_again, read_methods, ("claim.removed",)),
    "collection": Writer(
        sparse,
        write_sparse_training,
        read_centroids,
        ("shard.written", "shard.replaced", "centroids.written", "centroids.replaced"),
        in_turn=True,
    ),
    "prediction": Writer(predicted_otherwise, predict, read_predictions, ("prediction.weights", "prediction.cleared")),
    "new bank": Writer(nothing, create_bank, read_bank, ("bank.datasets", "bank.recorded")),
    "bank": Writer(
        filled_bank, append, read_bank, ("bank.gradients", "bank.records", "bank.ids", "bank.synced", "bank.committed")
    ),
    "compaction": Writer(deleted_from, compact, read_bank, ("bank.compacted", "bank.cleaned")),
    "index": Writer(corpus, build_index, read_index, ("index.marked", "index.built")),
    "index change": Writer(built, change_index, read_index, ("index.pending", "index.changed")),
    "addition": Writer(banked, change_both, read_both, ("change.recorded", "change.first", "change.both")),
    "deletion": Writer(banked, delete_both, read_both, ("change.recorded", "change.first", "change.both")),
}
