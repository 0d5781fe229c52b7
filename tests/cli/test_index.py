"""`graftwork index`, as a newcomer types it."""

from __future__ import annotations

import json
import shutil

import pytest

from graftwork.retrieval.index_storage import read_record, write_record


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "passages.tsv"
    path.write_text('id\ttext\ttitle\n1\t"cat sat mat"\tx\n2\t"cat cat dog"\tx\n3\t"bird sang loud morn"\tx\nbroken\n')
    return path


def test_an_index_is_built_searched_and_changed(graftwork, corpus, tmp_path):
    outcome = graftwork("index", corpus, "-o", tmp_path / "index", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["passages"] == 3
    assert "1 malformed rows" in outcome.err
    assert "line 5" in outcome.err
    outcome = graftwork("index", "-o", tmp_path / "index", "--query", "the cat", "--top-k", "1", "--json")
    assert [(hit["id"], hit["score"]) for hit in json.loads(outcome.out)] == [("2", 0.302253)]
    more = tmp_path / "more.jsonl"
    more.write_text('{"_id": "4", "text": "zebra", "title": ""}\n')
    outcome = graftwork(
        "index", more, "-o", tmp_path / "index", "--add", "--delete", "1", "--query", "zebra sat", "--json"
    )
    assert [hit["id"] for hit in json.loads(outcome.out)] == ["4"]


def test_wrong_use_says_what_to_do(graftwork, corpus, tmp_path):
    for words, hint in (
        (("-o", tmp_path / "i"), "Name a corpus"),
        ((corpus,), "-o"),
        ((corpus, "-o", tmp_path / "i", "--backend", "faiss"), "embedded, opensearch or elasticsearch"),
        ((corpus, "-o", "wiki", "--backend", "elasticsearch", "--add"), "embedded indexes"),
    ):
        outcome = graftwork("index", *words)
        assert (outcome.code, hint in outcome.err) == (2, True), outcome.err


def test_an_unfinished_index_is_searched_only_with_a_warning(graftwork, corpus, tmp_path):
    graftwork("index", corpus, "-o", tmp_path / "index")
    write_record(tmp_path / "index", {**read_record(tmp_path / "index"), "state": "building"})
    search = ("index", "-o", tmp_path / "index", "--query", "cat")
    outcome = graftwork(*search)
    assert outcome.code == 1
    assert "IncompleteIndexError" in outcome.err
    outcome = graftwork(*search, "--allow-incomplete")
    assert outcome.code == 0
    assert "Warning" in outcome.err
    shutil.move(tmp_path / "index", tmp_path / "index.part")
    assert graftwork(*search, "--allow-incomplete").code == 0
