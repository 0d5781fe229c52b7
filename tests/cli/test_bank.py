"""`graftwork bank …` without a model."""

from __future__ import annotations

import json
from pathlib import Path

from bank_writer import gradient, open_bank


def test_a_bank_is_looked_at_changed_copied_and_checked(graftwork, tmp_path: Path):
    folder = tmp_path / "bank"
    open_bank(folder).append([gradient(number) for number in range(8)])

    def run(*words):
        outcome = graftwork("bank", *words, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    assert run("stats", folder)["ids"] == 8
    assert run("verify", folder)["bad_ids"] == []
    assert run("delete", folder, "p1", "nobody") == {"deleted": 1, "missing": ["nobody"]}
    assert run("compact", folder)["bytes"] > 0
    assert run("merge", tmp_path / "merged", folder)["written"] == 7
    assert run("export", tmp_path / "merged", "-o", tmp_path / "out", "--id", "p2")["records"] == 1
    assert run("import", tmp_path / "out", "-o", tmp_path / "again")["ids"] == 1
    (path,) = (folder / "records.lance" / "data").iterdir()
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    outcome = graftwork("bank", "verify", folder, "--json")
    assert outcome.code == 1
    assert len(json.loads(outcome.out)["bad_ids"]) == 1


def test_wrong_use_says_what_to_do(graftwork, tmp_path: Path):
    outcome = graftwork("bank", "stats", tmp_path)
    assert (outcome.code, "Found no gradient bank" in outcome.err) == (2, True)
    (tmp_path / "x.pt").write_bytes(b"")
    outcome = graftwork("bank", "import", tmp_path / "x.pt", "-o", tmp_path / "b")
    assert (outcome.code, "--questions" in outcome.err) == (2, True)
    assert graftwork("bank").code == 2
