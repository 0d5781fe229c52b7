"""Rows that join and leave a running batch get the answers of transformers' `generate`, each alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from graftwork.evaluation.sampling import Sampling
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.text.requests import Question
from regrad_engine import adapted_decoder, encoder_of, passages, words

TOKENS = 24


@pytest.fixture(scope="module")
def decoder() -> Converted:
    return adapted_decoder(initial_step_size=30.0)


@pytest.fixture(scope="module")
def answerer(decoder, tmp_path_factory) -> Answerer:
    return _answerer(decoder, tmp_path_factory.mktemp("bank"))


def _answerer(decoder, folder, **options: Any) -> Answerer:
    encoder = encoder_of(decoder)
    bank = encoder.open_bank(folder / "bank")
    bank.append(encoder.encode(passages(decoder, 8)))
    return Answerer(decoder.model, decoder.tokenizer, bank, config=decoder.methods[-1].config, **options)


def questions(decoder: Converted, count: int, seed: int) -> list[Question]:
    """Random questions with all options, of lengths from a few to a hundred tokens."""
    draw, known = random.Random(seed), words(decoder)
    found = []
    for number in range(count):
        names = tuple(f"p{one}" for one in draw.sample(range(8), draw.randint(0, 3)))
        options: list[dict[str, Any]] = [
            {},
            {"strength": draw.choice([0.0, -1.0, 2.0])},
            {"adapter": False},
            {"sampling": Sampling(3.0, 0.9, number)},
            {"verbatim": True},
            {"system": "be brief", "history": (("user", "who ?"), ("assistant", "nobody"))},
        ]
        text = " ".join(draw.choices(known, k=draw.randint(1, 60)))
        found.append(Question(text, names, **draw.choice(options)))
    return found


def decoded(answerer: Answerer, asked: list[Question], seed: int, slots: int = 5) -> tuple[list[str], int]:
    """Answers by continuous batching with random arrivals and limits, and the largest number of rows in progress."""
    draw, decoder = random.Random(seed), answerer.decoder()
    waiting = [
        (number, answerer.decoding_row(answerer.gradient_retriever.retrieve([one])[0], TOKENS))
        for number, one in enumerate(asked)
    ]
    names: dict[int, int] = {id(row): number for number, row in waiting}
    found, most = {}, 0
    while waiting or decoder.rows:
        free = min(slots - len(decoder.rows), draw.randint(0, 3), len(waiting))
        if free:
            decoder.join([row for _, row in waiting[:free]])
            waiting = waiting[free:]
        most = max(most, len(decoder.rows))
        done = [row for row in decoder.rows if row.finished]
        for row in done:
            found[names[id(row)]] = answerer.decoded(row)
        decoder.leave(done)
        if decoder.rows:
            decoder.step()
    return [found[number] for number in range(len(asked))], most


def test_answers_of_a_changing_batch_equal_those_alone(decoder, answerer):
    asked = questions(decoder, 30, seed=1)
    expected = [answerer.answer([one], max_new_tokens=TOKENS)[0] for one in asked]
    found, most = decoded(answerer, asked, seed=2)
    assert most == 5
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.generated for one in found] == [one.generated for one in expected]
    assert len({one.text for one in expected}) > 10
    assert len({one.tokens for one in expected}) > 3


def test_answers_in_place_equal_those_alone(decoder, answerer, tmp_path):
    asked = questions(decoder, 6, seed=3)
    expected = [answerer.answer([one], max_new_tokens=TOKENS)[0].text for one in asked]
    before = answerer.weights_digest()
    found, _ = decoded(_answerer(decoder, tmp_path, in_place=True), asked, seed=4)
    assert [one.text for one in found] == expected
    assert answerer.weights_digest() == before
