"""Data on a terminal is neither markup nor control codes, and output works in every encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.core.messages import json_text, printable, say, show

ROW = {"title": "[/b] [red]x[/red]", "text": "a\x1b[2J\x9b31mb\x07", "word": "naïve ❤ – \ud800", "score": float("nan")}


class Terminal(io.TextIOWrapper):
    """Stream of an encoding that reports to be a terminal."""

    def __init__(self, encoding: str, *, tty: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="backslashreplace", write_through=True)
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def text(self) -> str:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
@pytest.mark.parametrize("tty", [True, False])
def test_records_keep_their_markup_and_lose_their_control_codes(encoding, tty, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal(encoding, tty=tty)
    monkeypatch.setattr(sys, "stdout", stream)
    show([ROW], as_json=False)
    show(ROW, as_json=False)
    show([ROW["text"]], as_json=False)
    assert stream.text().count("[/b] [red]x[/red]") == 2
    assert stream.text().count("a\\x1b[2J\\x9b31mb\\x07") == 3
    assert not {"\x1b", "\x9b", "\x07"} & set(stream.text())


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_json_is_valid_in_every_encoding(encoding, monkeypatch):
    stream = Terminal(encoding, tty=False)
    monkeypatch.setattr(sys, "stdout", stream)
    show([ROW], as_json=True)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(stream.text(), parse_constant=refuse) == [{**ROW, "score": None}]
    assert "\x9b" not in stream.text()
    show({"word": "❤"}, as_json=True)
    assert ("❤" in stream.text()) == (encoding == "utf-8")


def test_messages_escape_control_codes(capsys):
    say("a\x1b]0;title\x07b")
    assert capsys.readouterr().err == "a\\x1b]0;title\\x07b\n"
    assert printable("a\tb\nc") == "a\tb\nc"
    assert json_text({"a": "\x7f"}) == '{"a": "\\u007f"}'


def test_cells_with_line_breaks_stay_in_their_row(capsys):
    show([{"a": "x\ny\tz", "b": 1}], as_json=False)
    assert capsys.readouterr().out == "a\tb\nx\\ny\\tz\t1\n"


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.long)])
def test_commands_run_in_every_encoding(encoding, tmp_path):
    path = tmp_path / "c.tsv"
    path.write_text("id\ttext\ttitle\n1\tthe 東京 tower\t[/b] é\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
    for words in (["index", str(path), "-o", str(tmp_path / "index")], ["--help"], ["list", "tasks"]):
        done = subprocess.run(
            [sys.executable, "-m", "graftwork", *words], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        done.stdout.decode(encoding)


def test_results_are_written_as_valid_json_and_read_back(tmp_path: Path):
    from graftwork.metrics.results import ResultRow, Results

    row = ResultRow("t", "dev", "dense", scores={"bleu": float("nan"), "em": 1.0}, size=1)
    Results("m", None, rows=(row,), measures={"dense": {"kept": float("inf")}}).write(tmp_path / "results.json")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    scores = Results.read(tmp_path / "results.json").rows[0].scores
    assert scores["em"] == 1.0
    assert scores["bleu"] != scores["bleu"]
