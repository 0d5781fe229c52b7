"""Rows that join and leave a running batch get the answers of transformers' `generate`, each alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from graftwork.evaluation.sampling import Sampling
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering import decoding
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.decoding import ContinuousDecoder, DecodingRow
from graftwork.methods.regrad.answering.row_updates import RowUpdates
from graftwork.methods.regrad.modules import layout
from graftwork.methods.regrad.text.generation import generate_tokens
from graftwork.methods.regrad.text.requests import Question, RetrievedUpdate
from graftwork.methods.regrad.text.streaming import TextStream
from regrad_engine import adapted_decoder, encoder_of, passages, words
from tiny_models import EOS, PAD, tiny_model

TOKENS = 16


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


def decoded(answerer: Answerer, asked: list[Question], seed: int, slots: int = 5) -> tuple[list[Any], int]:
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
    asked = questions(decoder, 18, seed=1)
    expected = [answerer.answer([one], max_new_tokens=TOKENS)[0] for one in asked]
    found, most = decoded(answerer, asked, seed=2)
    assert most == 5
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.generated for one in found] == [one.generated for one in expected]
    assert len({one.text for one in expected}) > 8
    assert len({one.tokens for one in expected}) > 2


def test_answers_in_place_equal_those_alone(decoder, answerer, tmp_path):
    asked = questions(decoder, 4, seed=3)
    expected = [answerer.answer([one], max_new_tokens=TOKENS)[0].text for one in asked]
    before = answerer.weights_digest()
    found, _ = decoded(_answerer(decoder, tmp_path, in_place=True), asked, seed=4)
    assert [one.text for one in found] == expected
    assert answerer.weights_digest() == before


@pytest.mark.parametrize("joinable", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_unequal_length_equal_generate_alone(family, joinable, monkeypatch):
    """Mistral's window of 4 tokens is shorter than prompts and answers; models with other states run row by row."""
    if not joinable:
        monkeypatch.setattr(decoding, "is_joinable", lambda cache: False)
    model = convert(tiny_model(family).eval(), ReGrad(rank=2, layers="0-1", b_std=0.3)).model
    draw, size = random.Random(0), layout(model).size
    rows, expected = [], []
    for number in range(9):
        prompt = [draw.randrange(3, 30) for _ in range(draw.randint(1, 14))]
        delta = torch.randn(size, generator=torch.Generator().manual_seed(number)) * 0.3
        question = Question("?", (), sampling=Sampling(2.0, 0.9, number) if number % 3 == 0 else None)
        update = RetrievedUpdate(question, (), (), (), delta if number % 4 else None, 0.0, {})
        limit = draw.randint(1, 12)
        rows.append(DecodingRow(update, prompt, limit, frozenset({EOS})))
        with RowUpdates(model, [update]).applied():
            (tokens,) = generate_tokens(
                model, [prompt], [question.sampling], padding=PAD, ends=[EOS], max_new_tokens=limit
            )
        ends = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
        expected.append(tokens[:ends])
    decoder, waiting = ContinuousDecoder(model, PAD), list(rows)
    while waiting or decoder.rows:
        if waiting and len(decoder.rows) < 4:
            count = draw.randint(1, 4 - len(decoder.rows))
            decoder.join(waiting[:count])
            waiting = waiting[count:]
        decoder.leave([row for row in decoder.rows if row.finished])
        if decoder.rows:
            decoder.step()
    assert [row.tokens for row in rows] == expected


def test_models_repetition_penalty_applies_as_in_generate(decoder, answerer, monkeypatch):
    asked = questions(decoder, 4, seed=6)
    before = [answerer.answer([one], max_new_tokens=12)[0].text for one in asked]
    monkeypatch.setattr(answerer.model.generation_config, "repetition_penalty", 1.7)
    expected = [answerer.answer([one], max_new_tokens=12)[0].text for one in asked]
    assert expected != before
    rows = [answerer.decoding_row(answerer.gradient_retriever.retrieve([one])[0], 12) for one in asked]
    continuous = answerer.decoder()
    for row in rows:
        continuous.join([row])
        while not row.finished:
            continuous.step()
        continuous.leave([row])
    assert [answerer.decoded(row).text for row in rows] == expected


@pytest.mark.parametrize("stop", [(), ("bc",), ("c d", "x"), ("é",)])
def test_parts_of_a_stream_add_up_to_its_final_text(stop):
    """Parts of characters, white space and beginnings of stop sequences are held back until they are certain."""

    class Bytes:
        def decode(self, tokens: Any, *, verbatim: bool = False) -> str:
            text = bytes(tokens).decode(errors="replace")
            return text if verbatim else text.strip()

    draw = random.Random(7)
    for _ in range(200):
        data = "".join(draw.choices([" ", "a", "b", "c", " d", "é", "🙂"], k=12)).encode()
        for verbatim in (False, True):
            stream = TextStream(Bytes(), verbatim=verbatim, stop=stop)  # type: ignore[arg-type]
            parts = []
            for length in range(1, len(data) + 1):
                parts.append(stream.push(list(data[:length]), last=length == len(data)))
                if stream.stopped:
                    break
            whole = data.decode() if verbatim else data.decode().strip()
            ends = [whole.find(one) for one in stop if one in whole]
            assert "".join(parts) == (whole[: min(ends)] if ends else whole)
            assert stream.stopped == bool(ends)
