"""From a corpus to answers on real files: index, passages for questions, meta-training, bank, answers, forgetting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.cli.app import run

QUESTIONS, PASSAGES = 3, 2


def call(*words: object) -> None:
    assert run([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def place(shared: Path, tmp_path_factory) -> Path:
    """A folder with an index, augmented questions, a short meta-training, and a bank of the questions' passages."""
    folder = tmp_path_factory.mktemp("regrad")
    data = shared / "data"
    call("index", data / "dpr" / "psgs_w100.tsv", "-o", folder / "wiki")
    prepare = (
        "prepare",
        "multihop/popqa",
        "-i",
        data,
        "-o",
        folder / "data",
        "--index",
        folder / "wiki",
        "--top-k",
        PASSAGES,
    )
    questions = folder / "data" / "popqa"
    call(*prepare, "--split", "dev", "--end", QUESTIONS)
    (questions / f"dev.0-{QUESTIONS}.json").rename(questions / "dev.json")
    call(*prepare, "--split", "train", "--start", 300, "--end", 302, "--held-out", questions / "dev.json")
    (questions / "train.300-302.json").rename(questions / "train.json")
    settings = ("--rank", 4, "--layers", "2-4", "--initial-step-size", 2.0, "--max-document-tokens", 96)
    call("convert", "regrad", shared / "models" / "stories260K", "-o", folder / "run", *settings)
    call(
        "train",
        folder / "run",
        "--task",
        "multihop/popqa",
        "--data",
        folder / "data",
        "--max-steps",
        2,
        "--per-device-train-batch-size",
        2,
        "--learning-rate",
        0.01,
    )
    call("bank", "build", folder / "run", questions / "dev.json")
    return folder


@pytest.fixture
def evaluated(place: Path) -> Callable[..., dict[str, dict]]:
    """Evaluates, and gives the lines of predictions by question."""

    def evaluate(*options: object, name: str = "converted") -> dict[str, dict]:
        bank = f"method.bank={place / 'run' / 'artifacts' / 'bank'}"
        call("evaluate", place / "run", "--task", "multihop/popqa", "--data", place / "data", "--set", bank, *options)
        lines = (place / "run" / "predictions" / "multihop" / f"popqa.{name}.jsonl").read_text().splitlines()
        return {row["id"]: row for row in map(json.loads, lines)}

    return evaluate


def test_questions_are_answered_from_the_bank_and_forgotten_row_by_row(place, evaluated, graftwork):
    bank = place / "run" / "artifacts" / "bank"
    whole = evaluated()
    assert len(whole) == QUESTIONS
    assert all(row["update_norm"] > 0 and len(row["passages"]) == PASSAGES for row in whole.values())
    ids = json.loads(graftwork("bank", "stats", bank, "--json").out)["ids"]
    names = list(dict.fromkeys(name for row in whole.values() for name in row["passages"]))
    assert ids == len(names)
    outcome = graftwork("bank", "delete", bank, names[0])
    assert outcome.code == 0, outcome.err
    outcome = graftwork(
        "evaluate", place / "run", "--task", "multihop/popqa", "--data", place / "data", "--set", f"method.bank={bank}"
    )
    assert outcome.code == 1
    assert names[0] in outcome.err
    for done in range(1, len(names) + 1):
        if done > 1:
            assert graftwork("bank", "delete", bank, names[done - 1]).code == 0
        left = evaluated("--set", "method.on_missing=skip")
        gone = set(names[:done])
        for key, row in left.items():
            assert set(row["missing"]) == gone & set(row["passages"])
            if not row["missing"]:
                assert row["prediction"] == whole[key]["prediction"]
                assert row["update_norm"] == whole[key]["update_norm"]
    assert all(row["update_norm"] == 0 for row in left.values())
    nothing = evaluated("--set", "method.strength=0")
    assert {key: row["prediction"] for key, row in left.items()} == {
        key: row["prediction"] for key, row in nothing.items()
    }
    again = graftwork("bank", "build", place / "run", place / "data" / "popqa" / "dev.json", "--json")
    assert json.loads(again.out)["written"] + json.loads(again.out)["aliased"] == len(names)
    restored = evaluated()
    assert {key: row["prediction"] for key, row in restored.items()} == {
        key: row["prediction"] for key, row in whole.items()
    }


def test_questions_that_are_not_there_leave_no_bank_behind(place, graftwork, tmp_path):
    outcome = graftwork("bank", "build", place / "run", tmp_path / "none.json", "-o", tmp_path / "bank")
    assert outcome.code == 1
    assert "none.json" in outcome.err
    assert not (tmp_path / "bank").exists()


def test_questions_are_answered_from_a_bank_in_an_object_store_alike(place, evaluated, graftwork, address):
    data = place / "data" / "popqa" / "dev.json"
    outcome = graftwork("bank", "build", place / "run", data, "-o", address)
    assert outcome.code == 0, outcome.err
    # built, or built before and copied: the same bank
    again = graftwork("bank", "build", place / "run", data, "-o", address, "--json")
    assert json.loads(again.out)["written"] == 0
    assert graftwork("bank", "build", place / "run", data).code == 0
    whole, stored = evaluated(), evaluated("--set", f"method.bank={address}")
    for name in ("prediction", "passages", "update_norm"):
        assert {key: row[name] for key, row in stored.items()} == {key: row[name] for key, row in whole.items()}


def test_baselines_are_measured_on_the_same_questions_and_compared(place, evaluated, graftwork, tmp_path: Path):
    bank = f"method.bank={place / 'run' / 'artifacts' / 'bank'}"
    outcome = graftwork(
        "evaluate",
        place / "run",
        "--task",
        "multihop/popqa",
        "--data",
        place / "data",
        "--set",
        bank,
        "--over",
        "method.adapter=true,false",
        "--over",
        "method.blind=true,false",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)
    assert len({row["setting"] for row in rows}) == 4
    folder = place / "run" / "predictions" / "multihop"
    read = {}
    for row in rows:
        lines = (folder / f"popqa.{row['setting']}.jsonl").read_text().splitlines()
        read[row["setting"]] = [json.loads(line) for line in lines]
    for setting, found in read.items():
        used = "adapter=true" in setting or "adapter=True" in setting
        blind = "blind=true" in setting or "blind=True" in setting
        # with the adapter as it was learned, not as a new conversion would draw it
        assert all((line["update_norm"] > 0) == used for line in found), setting
        assert all((len(line["passages"]) > 0) == (used or not blind) for line in found), setting
    alone = evaluated()
    both = next(found for setting, found in read.items() if "false" not in setting.lower())
    assert {line["id"]: line["prediction"] for line in both} == {key: row["prediction"] for key, row in alone.items()}
    assert {line["update_norm"] for line in both} == {row["update_norm"] for row in alone.values()}
    names = [folder / f"popqa.{setting}.jsonl" for setting in read]
    compared = json.loads(graftwork("compare", *names, "--json").out)
    for row, found in zip(rows, compared, strict=True):
        assert found["f1"] == pytest.approx(row["f1"], abs=0.01)
        assert found["exact_match"] == pytest.approx(row["exact_match"], abs=0.01)
    assert compared[0]["difference"] == "–"
    assert all(isinstance(row["difference"], float) for row in compared[1:])
    assert graftwork("compare", names[0], "-o", tmp_path / "summary.json").code == 0
    scored = json.loads(graftwork("compare", tmp_path / "summary.json", "--json").out)[0]
    assert {name: scored[name] for name in ("questions", "f1", "exact_match", "group")} == {
        name: compared[0][name] for name in ("questions", "f1", "exact_match", "group")
    }


def test_questions_of_ones_own_find_their_passages(place, graftwork, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("What is the capital of France?\nWho is Zorbanax?\n")
    bank = place / "run" / "artifacts" / "bank"
    words = ("predict", place / "run", "--input", tmp_path / "mine.txt", "--set", f"method.bank={bank}", "--json")
    outcome = graftwork(*words)
    assert outcome.code == 2
    assert "no index to find some in" in outcome.err
    index = ("--set", f"method.index={place / 'wiki'}", "--set", "method.passages=2")
    outcome = graftwork(*words, *index, "--set", "method.on_missing=skip", "-o", tmp_path / "answers.jsonl")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(row["input"] for row in rows) == ["What is the capital of France?", "Who is Zorbanax?"]
    assert all(len(row["passages"]) == 2 for row in rows)
    text = "Zorbanax is the mayor of a small town beside the sea and has a dog."
    added = graftwork(
        "bank", "add", bank, place / "run", "--id", "tim", "--text", text, "--index", place / "wiki", "--json"
    )
    assert json.loads(added.out)["written"] == 1
    encode = graftwork(*words, *index, "--set", "method.on_missing=encode")
    found = [json.loads(line) for line in encode.out.splitlines()]
    assert all(row["missing"] == [] for row in found)
    tim = next(row for row in found if row["input"] == "Who is Zorbanax?")
    assert "tim" in tim["passages"]
    assert graftwork("bank", "delete", bank, "tim", "--index", place / "wiki").code == 0


def test_a_bank_that_is_not_there_is_asked_for(place, graftwork):
    outcome = graftwork("evaluate", place / "run", "--task", "multihop/popqa", "--data", place / "data")
    assert outcome.code == 2
    assert "graftwork bank build" in outcome.err
    outcome = graftwork("bank", "add", place / "nothing", place / "run", "--id", "a", "--text", "b")
    assert outcome.code == 2
    outcome = graftwork("bank", "add", place / "run" / "artifacts" / "bank", place / "run", "--id", "a")
    assert "either a file of passages, or one passage" in outcome.err
