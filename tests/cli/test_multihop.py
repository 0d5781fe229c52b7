"""Questions with passages by the command line, on real files."""

from __future__ import annotations

import json
from pathlib import Path


def test_questions_are_listed_shown_and_given_passages(graftwork, shared: Path, tmp_path: Path):
    assert "multihop/popqa" in graftwork("list", "tasks").out
    shown = graftwork("show", "multihop/popqa", "--data", shared / "data", "-n", "1", "--json")
    assert json.loads(shown.out)[0]["id"] == "0"
    assert graftwork("index", shared / "data" / "dpr" / "psgs_w100.tsv", "-o", tmp_path / "wiki").code == 0
    prepare = ("prepare", "multihop/popqa", "-i", shared / "data", "-o", tmp_path / "out", "--index", tmp_path / "wiki")
    for start, end in ((10, 14), (14, 16)):
        outcome = graftwork(*prepare, "--start", str(start), "--end", str(end), "--json")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)[0]["questions"] == end - start
    folder = tmp_path / "out" / "popqa"
    slices = ("--merge", folder / "dev.10-14.json", "--merge", folder / "dev.14-16.json")
    assert graftwork("prepare", "boolq", "-o", tmp_path / "out", *slices).code == 2
    assert graftwork("prepare", "multihop/popqa", "-o", tmp_path / "out").code == 2
    outcome = graftwork("prepare", "multihop/popqa", "-o", tmp_path / "out", *slices, "--json")
    rows = json.loads((folder / "dev.json").read_text())
    assert [row["test_id"] for row in rows] == list(range(10, 16))
    assert all(len(row["passages"]) == 3 for row in rows)
    outcome = graftwork(*prepare, "--split", "train", "--end", "12", "--held-out", folder / "dev.json")
    assert outcome.code == 1
    assert "shares 2 questions" in outcome.err
    assert graftwork(*prepare[:-2], "--json").code == 0
    written = [json.loads(line) for line in (tmp_path / "out" / "popqa_dev.jsonl").read_text().splitlines()]
    assert len(written) == 1200
    assert graftwork("prepare", "multihop/popq", "-i", shared, "-o", tmp_path).code == 2
