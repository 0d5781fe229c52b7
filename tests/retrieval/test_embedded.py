"""Embedded index: killed builds, commit records, changes, and real passages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.retrieval import IncompleteIndexError, Passage, embedded, open_index
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.index_storage import RECORD_FILE, write_record

BUILD = (
    "import sys; from graftwork.retrieval.embedded import build_embedded\n"
    "build_embedded(sys.argv[1], sys.argv[2], commit_passages=200)"
)


def passages(count: int) -> list[Passage]:
    return [Passage(f"p{n}", f"text number {n} with more words {n % 7}", f"title {n}") for n in range(count)]


def test_an_unfinished_index_is_refused_and_can_be_resumed(corpus, tmp_path: Path):
    path, target = corpus(*passages(3000)), tmp_path / "index"
    process = subprocess.Popen([sys.executable, "-c", BUILD, path, target])
    record = tmp_path / "index.part" / RECORD_FILE
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if record.exists() and "marked" in record.read_text():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = json.loads(record.read_text())
    assert begun["state"] == "building"
    assert begun["marked"] >= 200
    with pytest.raises(IncompleteIndexError, match=r"index\.part"):
        open_index(target)
    partial = EmbeddedIndex(target, allow_incomplete=True)
    assert "never finished" in (partial.warning or "")
    assert begun["marked"] <= len(partial) < 3000
    del partial
    index = build_embedded(path, target, commit_passages=200)
    assert len(index) == 3000
    assert sorted(passage.id for passage in index.all_passages()) == sorted(p.id for p in passages(3000))
    whole = build_embedded(path, tmp_path / "whole")
    assert index.index_fingerprint() == whole.index_fingerprint()


def test_resuming_with_another_corpus_is_refused(corpus, tmp_path: Path):
    path = corpus(*passages(500))
    subprocess.run([sys.executable, "-c", BUILD, path, tmp_path / "a"], check=True)
    (tmp_path / "a").rename(tmp_path / "b.part")
    record = json.loads((tmp_path / "b.part" / RECORD_FILE).read_text())
    write_record(tmp_path / "b.part", {**record, "state": "building", "marked": 200, "marked_digest": "0" * 32})
    with pytest.raises(DataError, match="changed since"):
        build_embedded(path, tmp_path / "b")
    with pytest.raises(DataError, match="other files"):
        build_embedded(corpus(*passages(10), name="other.jsonl"), tmp_path / "b")


def test_an_index_that_contradicts_its_commit_record_is_refused_unless_allowed(corpus, tmp_path: Path):
    build_embedded(corpus(*passages(5)), tmp_path / "index")
    record = json.loads((tmp_path / "index" / RECORD_FILE).read_text())
    write_record(tmp_path / "index", {**record, "count": 6})
    with pytest.raises(IncompleteIndexError, match="holds 5 passages; its commit record counts 6"):
        open_index(tmp_path / "index")
    allowed = EmbeddedIndex(tmp_path / "index", allow_incomplete=True)
    assert "holds 5 passages" in (allowed.warning or "")
    assert allowed.search(["text"], 1)[0]


def test_overwriting_keeps_the_old_index_until_the_new_one_is_complete(corpus, tmp_path: Path):
    build_embedded(corpus(Passage("a", "first")), tmp_path / "index")
    with pytest.raises(ConfigError, match="--overwrite"):
        build_embedded(corpus(Passage("b", "second")), tmp_path / "index")
    empty = corpus(name="empty.jsonl")
    with pytest.raises(DataError, match="found no passage"):
        build_embedded(empty, tmp_path / "index", overwrite=True)
    assert open_index(tmp_path / "index").search(["first"], 1)[0]
    import shutil

    shutil.rmtree(tmp_path / "index.part")
    build_embedded(corpus(Passage("b", "second")), tmp_path / "index", overwrite=True)
    assert [hit.id for hit in open_index(tmp_path / "index").search(["first second"], 2)[0]] == ["b"]


def test_adding_and_deleting_passages_updates_the_commit_record(corpus, tmp_path: Path):
    index = build_embedded(corpus(*passages(10)), tmp_path / "index")
    before = index.index_fingerprint()
    assert index.add([Passage("new", "zebra"), Passage("p3", "zebra zebra")]) == 1
    assert {hit.id for hit in index.search(["zebra"], 5)[0]} == {"new", "p3"}
    assert index.delete(["new", "nobody", "p4"]) == 2
    assert len(open_index(tmp_path / "index").search(["zebra title text"], 50)[0]) == len(index) == 9
    index.add([passages(10)[3], passages(10)[4]])
    assert index.index_fingerprint() == before == open_index(tmp_path / "index").index_fingerprint()
    with pytest.raises(DataError, match="without text"):
        index.add([Passage("x", " ")])


@pytest.mark.parametrize("committed", [True, False])
def test_a_change_killed_between_commit_and_commit_record_is_resolved(corpus, tmp_path: Path, monkeypatch, committed):
    index = build_embedded(corpus(*passages(10)), tmp_path / "index")

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "with_digests" if committed else "add_documents", stop)
    with pytest.raises(KeyboardInterrupt):
        index.add([Passage("p3", "zebra"), Passage("more", "zebra")])
    monkeypatch.undo()
    again = EmbeddedIndex(tmp_path / "index")
    assert len(again) == (11 if committed else 10)
    again.delete(["nobody"])
    whole = build_embedded(corpus(*again.all_passages(), name="again.jsonl"), tmp_path / "whole")
    assert again.index_fingerprint() == whole.index_fingerprint()


def test_malformed_rows_are_counted_and_named(tmp_path: Path):
    path = tmp_path / "bad.tsv"
    path.write_bytes(
        b'id\ttext\ttitle\n1\t"say ""hi"""\t"A ""B"""\n2\tonly two\n3\t"open\tt\n4\t \tt\n5\tb\xff\tt\n\n'
        b'6\t"a\tb"\tt\r\n'
    )
    index = build_embedded(path, tmp_path / "index")
    found = {passage.id: passage for passage in index.all_passages()}
    assert found == {"1": Passage("1", 'say "hi"', 'A "B"'), "6": Passage("6", "a\tb", "t")}
    assert index.record["source"]["malformed"] == 4
    assert [line.split(", ")[1].split(":")[0] for line in index.record["complaints"]] == [
        "line 3",
        "line 4",
        "line 5",
        "line 6",
    ]


def test_half_a_character_is_a_malformed_row(tmp_path: Path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"_id": "1", "text": "bad \\ud800 x"}\n{"_id": "2", "text": "whole \\ud83d\\ude00"}\n')
    index = build_embedded(path, tmp_path / "index")
    assert [passage.text for passage in index.all_passages()] == ["whole 😀"]
    assert "line 1: no usable JSON: text contains half a character, \\ud800" in index.record["complaints"][0]


def test_ids_that_no_request_can_name_are_malformed_rows(tmp_path: Path):
    path = tmp_path / "odd.jsonl"
    names = ["two\nlines", "escape\x1b", "line\u2028separator", "nul\0", "a/b#c%d ä"]
    rows = [*({"_id": name, "text": "some text"} for name in names), {"_id": "x", "text": "nul \0 inside"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = build_embedded(path, tmp_path / "index")
    assert [passage.id for passage in index.all_passages()] == ["a/b#c%d ä"]
    assert "line 1: the control character U+000A in the id" in index.record["complaints"][0]
    assert index.record["source"]["malformed"] == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n', "line 2: found the id '1' a second time"),
        ("c.tsv", "a\tb\n", "expected id, text and title"),
        ("c.txt", "a", "unknown kind"),
    ],
)
def test_the_error_of_an_invalid_corpus_names_the_reason(tmp_path: Path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build_embedded(tmp_path / name, tmp_path / "index")


def test_errors_of_a_missing_corpus_and_index_name_the_next_step(tmp_path: Path):
    with pytest.raises(DataError, match="Found no corpus"):
        build_embedded(tmp_path / "nothing.tsv", tmp_path / "index")
    with pytest.raises(ConfigError, match="graftwork index"):
        open_index(tmp_path / "index")
    with pytest.raises(ConfigError, match="embedded, opensearch or elasticsearch"):
        open_index(tmp_path, "faiss")


def test_real_passages_are_all_indexed_and_found(shared: Path, tmp_path: Path):
    index = build_embedded(shared / "data" / "dpr" / "psgs_w100.tsv", tmp_path / "index")
    assert len(index) == 4443  # what the data's own table states
    # in the order of ids: that of the index depends on its threads
    sample = sorted(index.all_passages(), key=lambda passage: passage.id)[::4]
    queries = [f"{passage.title} {' '.join(passage.text.split()[:25])}" for passage in sample]
    found = [[hit.id for hit in hits] for hits in index.search(queries, 3)]
    # passages of one article share much of their wording
    assert sum(ids[0] == one.id for ids, one in zip(found, sample, strict=True)) >= 0.95 * len(sample)
    assert sum(one.id in ids for ids, one in zip(found, sample, strict=True)) >= 0.999 * len(sample)


def test_a_killed_process_leaves_no_lock(corpus, tmp_path: Path):
    build_embedded(corpus(*passages(3)), tmp_path / "index")
    code = (
        "import sys, time; from graftwork.retrieval.embedded import *; from graftwork.retrieval import embedded as e\n"
        "w = e.EmbeddedIndex(sys.argv[1])._index.writer(1 << 25, 1); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "index"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert EmbeddedIndex(tmp_path / "index").add([Passage("q", "zebra")]) == 1
