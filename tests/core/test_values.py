"""Small values and files of `core`: examples, YAML files, progress, atomic writing."""

from __future__ import annotations

import pytest

from graftwork.core.config import write_yaml
from graftwork.core.example import Example, Examples
from graftwork.core.files import recover_folder, swap_folder, write_text
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError


def test_the_first_rows_have_their_own_size_and_no_ignored_rows():
    rows = tuple(Example(str(number), "x", "y") for number in range(5))
    examples = Examples("t", "dev", rows, size=8, ignored=3, source="file")
    first = examples.first(2)
    assert [row.key for row in first.rows] == ["0", "1"]
    assert (first.size, first.ignored, first.task, first.source) == (2, 0, "t", "file")
    with pytest.raises(ConfigError):
        examples.first(0)


def test_a_yaml_file_keeps_the_order_of_its_keys(tmp_path):
    write_yaml(tmp_path / "run.yaml", {"model": "ä", "data": 1, "after": None})
    lines = (tmp_path / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith("#")] == ["model", "data", "after"]
    assert "model: ä" in lines


def test_files_are_written_into_new_and_existing_folders(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "new" / "folder" / "file.txt", text)
    assert (tmp_path / "new" / "folder" / "file.txt").read_text() == "two"
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["file.txt"]


def test_progress_without_a_terminal_prints_the_current_description(monkeypatch, capsys):
    monkeypatch.setattr("graftwork.core.progress.PLAIN_SECONDS", 0.0)
    with Progress("first", total=4) as progress:
        progress.advance(1)
        progress.describe("second")
        progress.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("first: 1 of 4")
    assert lines[1].startswith("second: 3 of 4")


def test_a_folder_is_recovered_only_if_the_new_one_is_missing(tmp_path):
    target, old = tmp_path / "model", tmp_path / "model.old"
    write_text(target / "weights", "new")
    write_text(old / "weights", "old")
    recover_folder(target)
    assert (target / "weights").read_text() == "new"
    assert (old / "weights").read_text() == "old"
    write_text(tmp_path / "next" / "weights", "next")
    swap_folder(tmp_path / "next", target)
    assert (target / "weights").read_text() == "next"
    assert not old.exists()
    target.rename(old)
    recover_folder(target)
    assert (target / "weights").read_text() == "next"
    recover_folder(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
