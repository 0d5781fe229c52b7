"""Integrity of the embedded index: flipped bits, panics, read-only folders, locks and file modes."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tantivy

from graftwork.cli.app import run
from graftwork.errors import DataError, DiskFullError, GraftworkError
from graftwork.retrieval import DamagedIndexError, Passage, embedded, index_storage
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.index_storage import RECORD_FILE, check_footer, committed_files
from graftwork.retrieval.ranking import Ranking
from graftwork.retrieval.retriever import IndexLockedError

FLIPS = 100
READ_ONLY = (
    "import os, sys\n"
    "import filelock, pyarrow, tempfile\n"
    "from graftwork.retrieval.embedded import EmbeddedIndex\n"
    "from graftwork.retrieval import Passage\n"
    # imports everything before the rights are given up: the interpreter may be installed for root only
    "EmbeddedIndex(sys.argv[1]).search(['zebra', 'lion'], 1)\n"
    "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    "index = EmbeddedIndex(sys.argv[1])\n"
    "print(len(index), index.search(['zebra'], 1)[0][0].id)\n"
    "try: index.add([Passage('q', 'lion')])\n"
    "except Exception as error: print(type(error).__name__, error)\n"
)


class PanicException(BaseException):
    """Substitute for the class of pyo3, which has no importable name."""


@pytest.fixture
def index(corpus, tmp_path: Path) -> Path:
    passages = [Passage(f"p{n}", f"text number {n} with words {n % 7}", f"title {n}") for n in range(60)]
    one = build_embedded(corpus(*passages, Passage("z", "zebra")), tmp_path / "index")
    one.delete(["p3"])
    return tmp_path / "index"


def behaviour(folder: Path) -> Any:
    """Everything that a user can read from an index."""
    one = EmbeddedIndex(folder)
    hits = one.search(["text words 3", "zebra", "title 12 number"], 5)
    return len(one), one.index_fingerprint(), hits, sorted(one.all_passages(), key=lambda passage: passage.id)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    rewrite(path, bytes(content))


def rewrite(path: Path, content: bytes) -> None:
    """Replace a file by a new one; truncating one that an earlier index still maps would end the process (SIGBUS)."""
    changed = path.with_name(f"{path.name}.changed")
    changed.write_bytes(content)
    changed.replace(path)


def test_every_flipped_bit_is_detected_or_harmless(index: Path, tmp_path: Path):
    expected, draw = behaviour(index), random.Random(0)
    files = [path for path in sorted(index.iterdir()) if path.stat().st_size]
    detected = 0
    for number in range(FLIPS):
        path = draw.choice(files)
        copy = tmp_path / f"copy{number}"
        shutil.copytree(index, copy)
        flip(copy / path.name, draw.randrange(8 * path.stat().st_size))
        try:
            assert behaviour(copy) == expected, path.name
        except GraftworkError:
            detected += 1
        shutil.rmtree(copy)
    assert detected > FLIPS / 2


def test_a_flipped_bit_of_an_index_without_digests_is_found_by_its_checksum(index: Path):
    record = json.loads((index / RECORD_FILE).read_text())
    old = {key: value for key, value in record.items() if key not in ("index_files", "record_digest")}
    (index / RECORD_FILE).write_text(json.dumps({**old, "schema": 1}))
    assert "earlier version, without digests" in (EmbeddedIndex(index).warning or "")
    path = next(index.glob("*.idx"))
    flip(path, 8 * 28 + 7)
    with pytest.raises(DamagedIndexError, match=r"\.idx differs from tantivy's checksum"):
        EmbeddedIndex(index)
    flip(path, 8 * 28 + 7)
    EmbeddedIndex(index).delete(["p4"])
    assert EmbeddedIndex(index).warning is None


def test_file_with_one_flipped_bit_that_changed_scores_fails_its_checksum(shared: Path):
    path = shared / "findings" / "integrity" / "flipped.58b80b.idx.28.7"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    with pytest.raises(DamagedIndexError, match="checksum"):
        check_footer(path)


def test_large_indexes_are_compared_by_size_when_opened_and_completely_by_verify(index: Path, monkeypatch, capsys):
    monkeypatch.setattr(index_storage, "FULL_CHECK_BYTES", 0)
    monkeypatch.setattr(index_storage, "_ALWAYS_CHECKED_BYTES", 0)
    assert run(["index", "-o", str(index), "--verify"]) == 0
    assert f"Verified {len(committed_files(index))} files" in capsys.readouterr().err
    flip(next(index.glob("*.idx")), 8 * 28 + 7)
    EmbeddedIndex(index)
    assert run(["index", "-o", str(index), "--verify"]) == 1
    assert "differs from its digest" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["removed", "cut", "added"])
def test_missing_cut_and_additional_files_are_detected(index: Path, change):
    path = next(index.glob("*.store"))
    if change == "removed":
        path.unlink()
    elif change == "cut":
        rewrite(path, path.read_bytes()[:-10])
    else:
        path.with_suffix(".other").write_bytes(b"")
    with pytest.raises(DamagedIndexError, match=str(path.stem)):
        EmbeddedIndex(index)


def test_a_changed_commit_record_is_refused_and_replaced_by_overwrite(index: Path, corpus):
    record = json.loads((index / RECORD_FILE).read_text())
    (index / RECORD_FILE).write_text(json.dumps({**record, "count": 59}))
    with pytest.raises(DamagedIndexError, match="was changed after it was written"):
        EmbeddedIndex(index)
    assert len(build_embedded(corpus(Passage("a", "b")), index, overwrite=True)) == 1


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX permissions")
def test_an_index_in_a_read_only_folder_is_searched_but_not_changed(index: Path, open_folder: Path):
    folder = shutil.copytree(index, open_folder / "index")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    done = subprocess.run([sys.executable, "-c", READ_ONLY, folder], capture_output=True, text=True, check=False)
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "60 z"
    assert lines[1].startswith("ConfigError")
    assert "is read-only" in lines[1]


def test_files_of_an_index_follow_the_umask(index: Path):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in index.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert {mode & ~0o100 for mode in modes.values()} == {0o666 & ~umask}, modes


def test_a_passage_that_cannot_be_added_does_not_block_later_changes(index: Path, monkeypatch):
    one = EmbeddedIndex(index)
    with pytest.raises(DataError, match="half a character"):
        one.add([Passage("q", "text", "bad \ud800 title")])

    def fail(writer: Any, passages: Any) -> None:
        raise MemoryError

    kept: list[BaseException] = []
    with monkeypatch.context() as patched:
        patched.setattr(embedded, "add_documents", fail)
        for name in ("a", "b"):
            try:
                one.add([Passage(name, "text")])
            except MemoryError as error:
                kept.append(error)  # its traceback keeps the frames alive
    assert len(kept) == 2
    assert one.add([Passage("q", "lion")]) == 1
    assert [hit.id for hit in EmbeddedIndex(index).search(["lion"], 2)[0]] == ["q"]


def test_a_panic_of_tantivy_is_an_error_with_the_folder(index: Path, monkeypatch, capsys):
    def panic(*arguments: Any) -> None:
        raise PanicException("index out of bounds: the len is 3")

    monkeypatch.setattr(Ranking, "best", panic)
    with pytest.raises(DamagedIndexError, match="out of bounds"):
        EmbeddedIndex(index).search(["zebra"], 1)
    assert run(["index", "-o", str(index), "--query", "zebra"]) == 1
    assert str(index) in capsys.readouterr().err


def test_a_panic_that_no_reader_translates_is_a_failed_command(monkeypatch, capsys):
    def panic(*arguments: Any, **options: Any) -> None:
        # a panic of tantivy itself: no document has this address
        builder = tantivy.SchemaBuilder()
        tantivy.Index(builder.build()).searcher().doc(tantivy.DocAddress(7, 7))

    monkeypatch.setattr("graftwork.retrieval.maintenance.index_passages", panic)
    assert run(["index", "-o", "x", "--verify"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("PanicException: index out of bounds")
    assert last.endswith("rerun with --debug for a traceback.")


def test_a_second_writer_is_refused(index: Path, monkeypatch):
    monkeypatch.setattr(index_storage, "LOCK_SECONDS", 0.1)
    with index_storage.write_lock(index), pytest.raises(IndexLockedError, match="being changed by another"):
        EmbeddedIndex(index).add([Passage("q", "lion")])


def test_two_writers_add_to_one_index_in_turns(index: Path):
    one, two = EmbeddedIndex(index), EmbeddedIndex(index)
    one.add([Passage("q", "lion")])
    two.add([Passage("r", "lion")])
    one.delete(["q"])
    again = EmbeddedIndex(index)
    assert [hit.id for hit in again.search(["lion"], 5)[0]] == ["r"]
    assert len(again) == again.record["count"] == 61


def test_a_full_disk_is_not_reported_as_damage(index: Path, monkeypatch):
    def full(writer: Any, passages: Any) -> None:
        raise ValueError("IoError(Os { code: 28, kind: StorageFull, message: 'No space left on device' })")

    monkeypatch.setattr(embedded, "add_documents", full)
    with pytest.raises(DiskFullError, match="Cannot write"):
        EmbeddedIndex(index).add([Passage("q", "lion")])
    monkeypatch.undo()
    assert EmbeddedIndex(index).add([Passage("q", "lion")]) == 1
