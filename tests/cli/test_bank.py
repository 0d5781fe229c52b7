"""`graftwork bank …` without a model."""

from __future__ import annotations

import json
from pathlib import Path

from bank_writer import gradient, open_bank
from graftwork.methods.regrad.bank.opening import backend_for
from object_store import Files


def test_a_bank_is_looked_at_changed_copied_and_checked(graftwork, location, tmp_path: Path):
    folder = location
    open_bank(folder).append([gradient(number) for number in range(8)])

    def run(*words):
        outcome = graftwork("bank", *words, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    assert run("stats", folder)["ids"] == 8
    assert run("verify", folder)["bad_ids"] == []
    assert run("delete", folder, "p1", "nobody") == {"deleted": 1, "missing": ["nobody"]}
    assert run("compact", folder)["bytes"] > 0
    assert run("merge", f"{folder}-merged", folder)["written"] == 7
    assert run("export", f"{folder}-merged", "-o", tmp_path / "out", "--id", "p2")["records"] == 1
    assert run("import", tmp_path / "out", "-o", f"{folder}-again")["ids"] == 1
    files = Files(backend_for(folder))
    (path,) = files.names("records.lance/data")
    content = bytearray(files.read(path))
    content[600] ^= 1
    files.write(path, bytes(content))
    outcome = graftwork("bank", "verify", folder, "--json")
    assert outcome.code == 1
    assert len(json.loads(outcome.out)["bad_ids"]) == 1


def test_a_store_that_cannot_be_reached_is_said_in_one_line(graftwork, object_store):
    for words in (("stats",), ("verify",), ("compact",), ("delete", "p1"), ("merge", "bank"), ("export", "-o", "out")):
        outcome = graftwork("bank", words[0], "s3://nobucket/bank", *words[1:])
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
        assert "s3://nobucket/bank cannot be reached" in outcome.err or "no gradient bank in bank" in outcome.err
    outcome = graftwork("bank", "stats", "ftp://host/bank")
    assert (outcome.code, "expected a folder, or an address" in outcome.err) == (2, True)


def test_wrong_use_says_what_to_do(graftwork, tmp_path: Path):
    outcome = graftwork("bank", "stats", tmp_path)
    assert (outcome.code, "Found no gradient bank" in outcome.err) == (2, True)
    (tmp_path / "x.pt").write_bytes(b"")
    outcome = graftwork("bank", "import", tmp_path / "x.pt", "-o", tmp_path / "b")
    assert (outcome.code, "--questions" in outcome.err) == (2, True)
    assert graftwork("bank").code == 2


def test_what_is_about_training_adapters_is_refused_without_it_and_the_other_way_round(graftwork):
    for words, message in (
        (("--epochs", "3"), "Found --epochs, which applies to adapter training only. Add --train-adapters"),
        (("--pairs", "some.jsonl"), "Found --pairs, which applies to adapter training only"),
        (("--train-adapters",), "no pairs file, and texts joined, which need a pairs file"),
        (("--train-adapters", "--texts", "passage", "--pairs", "some.jsonl"), "texts passage, which need no pairs"),
        (("--train-adapters", "--texts", "odd"), "Found texts 'odd'; expected one of"),
    ):
        outcome = graftwork("bank", "build", "run", "corpus.tsv", *words)
        assert outcome.code == 2
        assert message in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
