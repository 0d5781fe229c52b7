"""Documents split into passages: limits, overlap, nothing lost, and ids that name the document."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from graftwork.cli.app import run
from graftwork.errors import ConfigError
from graftwork.retrieval import Hit, Passage, open_index
from graftwork.retrieval.splitting import DocumentSplitter
from tokenizer_layouts import layout


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def hit(name: str) -> Hit:
    return Hit(name, "", "", 0.0, 0)


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_passages_are_within_the_limit_overlap_and_lose_nothing(family):
    tokenizer, draw = layout(family), random.Random(0)
    for number in range(20):
        words = [draw.choice(["the", "sun", "is", "a", "star.", "café", "日本", "x-ray", "end!\n"]) for _ in range(150)]
        text = " ".join(words)
        passages = list(DocumentSplitter(tokenizer, 40, 8).split(Passage("doc", text, "Title")))
        assert [one.id for one in passages] == [f"doc:passage{at}" for at in range(len(passages))]
        assert {one.title for one in passages} == {"Title"}
        assert {hit(one.id).document for one in passages} == {"doc"}
        assert all(count(tokenizer, one.text) <= 40 for one in passages)
        # each is found in the text, begins before the end of the one before, and the last one ends the text
        at = end = 0
        for one in passages:
            at = text.index(one.text, at)
            assert at <= end, number
            end = at + len(one.text)
        assert text.rstrip().endswith(passages[-1].text)
        # a passage that ends within the text ends with a sentence where there is one
        assert sum(one.text[-1] in ".!" for one in passages[:-1]) >= 0.5 * (len(passages) - 1)


def test_short_documents_stay_as_they_are():
    document = Passage("a:b", "The sun is a star.", "Sun")
    assert list(DocumentSplitter(layout("llama3"), 200, 40).split(document)) == [document]
    assert hit("a:b").document == "a:b"
    assert hit("a:passage1:passage12").document == "a:passage1"


def test_too_much_overlap_is_refused():
    with pytest.raises(ConfigError, match="overlap of 20"):
        DocumentSplitter(layout("llama3"), 40, 20)


def test_the_command_splits_and_indexes(tmp_path: Path, capsys):
    layout("llama3").save_pretrained(tmp_path / "tokenizer")
    text = "The sun is a star. " * 30 + "The moon is round."
    (tmp_path / "documents.jsonl").write_text(json.dumps({"_id": "sky", "text": text, "title": "Sky"}) + "\n")
    command = ["index", str(tmp_path / "documents.jsonl"), "-o", str(tmp_path / "index"), "--split-tokens", "60"]
    assert run(command) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert run([*command, "--tokenizer", str(tmp_path / "tokenizer"), "--overlap", "10"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "index.passages.jsonl").read_text().splitlines()]
    index = open_index(tmp_path / "index")
    (found,) = index.search(["moon"], 1)
    assert (found[0].id, found[0].document) == (rows[-1]["_id"], "sky")
    assert len(rows) > 3
    assert run(["index", "-o", str(tmp_path / "index"), "--query", "moon", "--overlap", "10"]) == 2
