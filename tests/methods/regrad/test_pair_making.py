"""Pairs files by the pretrained model: parsing, failures, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.regrad.modules import adapters
from graftwork.methods.regrad.text.pair_making import PairMaker, make_pairs, parsed_pairs
from graftwork.methods.regrad.text.pairs import Pair, read_pairs
from regrad_engine import adapted_decoder, passages


@pytest.fixture(scope="module")
def converted():
    return adapted_decoder(b_std=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "Question: Who was it?\nAnswer: Ada, in 1843\nQuestion: Where?\nAnswer: London.\n",
        "1. Question: Who was it?\n   Answer: Ada, in 1843\n\n2. Question: Where?\n   Answer: London.",
        "**Question 1:** Who was it?\n**Answer 1:** Ada, in 1843\n- **Question 2:** Where?\n- **Answer 2:** London.",
        "Sure!\n\nquestion: Who was it?\n\nanswer: Ada, in 1843\nQuestion: Where?\nAnswer: London.\nQuestion: And?",
        "Question: Who was it?\nAnswer: Ada, in 1843\n" + "Question: Where?\nAnswer: London.\n" * 2,
    ],
)
def test_pairs_are_parsed_from_common_formats(text):
    found = parsed_pairs(text)
    assert [pair.answer for pair in found] == ["Ada, in 1843", "London."]
    assert [pair.question for pair in found] == ["Who was it?", "Where?"]
    assert parsed_pairs("The baker was born in april. Question: none") == ()


def stub_generation(maker: PairMaker, monkeypatch, pairs: str) -> list[int]:
    """Replace generation by a fixed text; return the list of batch sizes."""
    calls: list[int] = []

    def generate(prompts, sampling):
        calls.append(len(prompts))
        asked = "write three questions" in maker.tokenizer.decode(prompts[0])
        tokens = maker.tokenizer(pairs if asked else "said again", add_special_tokens=False)["input_ids"]
        return [[*tokens, maker.tokenizer.eos_token_id] for _ in prompts]

    monkeypatch.setattr(maker, "generate", generate)
    return calls


def test_make_pairs_resumes_an_interrupted_file(converted, tmp_path: Path, monkeypatch):
    some, path = passages(converted, 5), tmp_path / "pairs.jsonl"
    maker = PairMaker(converted.model, converted.tokenizer, at_least=1, batch_size=2, max_new_tokens=40)
    calls = stub_generation(maker, monkeypatch, "who? answer: baino")
    monkeypatch.setattr(
        "graftwork.methods.regrad.text.pair_making.parsed_pairs", lambda text: (Pair("who?", text.split()[-1]),)
    )
    assert make_pairs(maker, some[:3], path).written == 3
    with path.open("a") as file:
        file.write('{"id": "p3", "rewr')  # a process killed in the middle of a line
    done = make_pairs(maker, some, path)
    assert (done.written, done.skipped, done.failed) == (2, 3, 0)
    found = read_pairs(path)
    assert list(found) == [one.id for one in some]
    assert found["p4"].rewrite == "said again"
    assert found["p4"].pairs == (Pair("who?", "baino"),)
    assert sum(calls) == 10  # two texts per passage, none generated twice


def test_make_pairs_writes_duplicate_passages_once(converted, tmp_path: Path, monkeypatch):
    first, second, third = passages(converted, 3)
    path = tmp_path / "pairs.jsonl"
    maker = PairMaker(converted.model, converted.tokenizer, at_least=1, batch_size=2, max_new_tokens=40)
    calls = stub_generation(maker, monkeypatch, "who? answer: baino")
    monkeypatch.setattr(
        "graftwork.methods.regrad.text.pair_making.parsed_pairs", lambda text: (Pair("who?", text.split()[-1]),)
    )
    # twice within one batch of two, and again in later batches
    done = make_pairs(maker, [first, first, second, first, third, second], path)
    assert (done.written, done.skipped, done.failed) == (3, 3, 0)
    rows = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert rows == [first.id, second.id, third.id]
    assert list(read_pairs(path)) == rows
    assert sum(calls) == 6  # two texts per distinct passage


def test_failed_passages_are_counted_and_retried(converted, tmp_path: Path, monkeypatch):
    some, path = passages(converted, 3), tmp_path / "pairs.jsonl"
    maker = PairMaker(converted.model, converted.tokenizer, max_new_tokens=40)
    calls = stub_generation(maker, monkeypatch, "the baker was born in april")
    for _ in range(2):
        done = make_pairs(maker, some, path)
        assert (done.written, done.failed) == (0, 3)
        assert "passage 'p0': 0 pairs of at least 3 in 'the baker" in done.reasons[0]
    assert sum(calls) == 12
    endless = PairMaker(converted.model, converted.tokenizer, max_new_tokens=100_000)
    assert "too long for the model with 100000 new tokens" in make_pairs(endless, some, path).reasons[0]


def test_texts_are_independent_of_the_adapter_and_of_the_batch_size(converted):
    some = passages(converted, 3)
    together = PairMaker(converted.model, converted.tokenizer, batch_size=3, max_new_tokens=8)
    written = together.texts(some, "rewrite")
    single = PairMaker(converted.model, converted.tokenizer, batch_size=1, max_new_tokens=8)
    assert single.texts(some, "rewrite") == written
    for adapter in adapters(converted.model).values():
        with torch.no_grad():
            adapter.lora_B.neg_()
    assert single.texts(some, "rewrite") == written
    drawn = {
        seed: PairMaker(converted.model, converted.tokenizer, max_new_tokens=8, temperature=2.0, seed=seed).texts(
            some, "rewrite"
        )
        for seed in (0, 0, 1)
    }
    assert drawn[0] != drawn[1]
    again = PairMaker(converted.model, converted.tokenizer, batch_size=1, max_new_tokens=8, temperature=2.0)
    assert again.texts(some, "rewrite") == drawn[0]


def test_out_of_range_numbers_raise(converted):
    for wrong in ({"at_least": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PairMaker(converted.model, converted.tokenizer, **wrong)
