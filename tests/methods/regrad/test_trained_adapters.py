"""Parametric RAG: batched training equals separate training, and banks of adapters are distinct from gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapted_models import adapted_llama, flat, plain_copy, relative, theta_of
from adapted_models import passages as random_passages
from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError
from graftwork.grafting.conversion import convert
from graftwork.methods.regrad import reference
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.open_answering import open_answering
from graftwork.methods.regrad.bank.errors import DuplicatePassageError, FingerprintMismatchError, MissingGradientError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.transfer import export, import_export, merge, record_digests
from graftwork.methods.regrad.encoding.adapter_training import AdapterTraining, trained_adapters
from graftwork.methods.regrad.encoding.adapters import AdapterEncoder
from graftwork.methods.regrad.encoding.encoder import encode_passages
from graftwork.methods.regrad.encoding.workers import EncodingActor
from graftwork.methods.regrad.modules import adapters, flat_adapter, updated
from graftwork.methods.regrad.text.pairs import Augmented, Pair, read_pairs
from graftwork.methods.regrad.text.requests import Question
from graftwork.retrieval.retriever import Passage
from graftwork.settings.evaluation import EvaluationSettings
from regrad_engine import adapted_decoder, encoder_of, passages
from regrad_toy import examples, toy_method, toy_model, toy_tokenizer


def alone(model: Any, texts: list[torch.Tensor], training: AdapterTraining) -> torch.Tensor:
    """Change of the adapter when torch's AdamW trains one passage, on merged weights."""
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    start = flat(model, theta).detach().clone()
    optimizer = torch.optim.AdamW(
        theta.values(), lr=training.learning_rate, weight_decay=training.weight_decay, foreach=False
    )
    for _ in range(training.epochs):
        for begin in range(0, len(texts), training.texts_per_update):
            part = texts[begin : begin + training.texts_per_update]
            optimizer.zero_grad()
            loss = torch.stack([reference.text_loss(dense, theta, scaling, text) for text in part]).mean()
            loss.backward()
            optimizer.step()
    return flat(model, theta).detach() - start


@pytest.mark.parametrize("b_std", [0.02, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 1e-4)])
def test_batched_training_equals_separate_training(b_std, dtype, tolerance):
    model = adapted_llama(b_std=b_std, dtype=dtype).to(dtype)
    training = AdapterTraining(epochs=2, texts_per_update=2, learning_rate=3e-3)
    texts = [random_passages(count, seed=count) for count in (3, 1, 6)]
    before = flat_adapter(model).detach().clone()
    found, losses = trained_adapters(model, [[text.tolist() for text in own] for own in texts], training)
    expected = [alone(model, own, training) for own in texts]
    assert torch.equal(flat_adapter(model), before)
    assert all(parameter.requires_grad for parameter in adapters(model)["model.layers.2.mlp.gate_proj"].parameters())
    for row, other, loss in zip(found, expected, losses, strict=True):
        assert relative(row, other) < tolerance
        assert 0 < loss < 10
    assert min(relative(found[0], other) for other in expected[1:]) > 0.1


@pytest.fixture(scope="module")
def converted():
    return adapted_decoder(prompt="simple")


def pairs_of(some: list[Passage], count: int = 3) -> dict[str, Augmented]:
    return {
        one.id: Augmented(
            f"{one.text.split()[-1]} {one.text}",
            tuple(Pair(f"what is {word}", word) for word in one.text.split()[:count]),
        )
        for one in some
    }


def trainer_of(converted: Any, pairs: Any, *, batch_size: int = 4, **training: Any) -> AdapterEncoder:
    config: Any = converted.methods[-1].config
    settings = AdapterTraining(**{"learning_rate": 1e-2, **training})
    return AdapterEncoder(converted.model, converted.tokenizer, config, batch_size, 4096, settings, pairs)


@pytest.fixture(scope="module")
def filled(converted, tmp_path_factory):
    """Encoder with pairs, eight passages, and their bank."""
    some = passages(converted, 8)
    encoder = trainer_of(converted, pairs_of(some))
    location = tmp_path_factory.mktemp("trained") / "bank"
    bank = encoder.open_bank(location, precision="float32")
    assert encode_passages(encoder, bank, some).written == 8
    return encoder, some, location


def decoded(encoder: AdapterEncoder, passage: Passage) -> list[str]:
    document = encoder.document(passage)
    return [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in document.texts]


def test_training_texts_are_joined_or_apart(converted):
    passage = Passage("p", "tasow baino lives in parik.", "")
    pairs = {"p": Augmented("parik is home to baino.", (Pair("who?", "baino"), Pair("where?", "parik")))}
    joined = decoded(trainer_of(converted, pairs), passage)
    assert len(joined) == 4
    for text, statement, asked in zip(joined, ["lives", "home"] * 2, ["who", "who", "where", "where"], strict=True):
        assert statement in text
        assert text.index(statement) < text.index(f"question: {asked}") < text.index("answer:")
    apart = decoded(trainer_of(converted, pairs, texts="apart"), passage)
    assert [("lives" in text, "home" in text, "question" in text) for text in apart] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, False, True),
    ]
    assert len(decoded(trainer_of(converted, None, texts="passage"), passage)) == 1


def test_passages_without_pairs_are_rejected_and_long_ones_cut(converted, tmp_path: Path):
    some = passages(converted, 3, shortest=60, longest=80)
    short = adapted_decoder(prompt="simple", max_document_tokens=40)
    encoder = trainer_of(short, {key: value for key, value in pairs_of(some).items() if key != "p1"})
    document = encoder.document(some[0])
    assert document.truncated
    assert max(document.lengths) <= 40
    assert all("answer:" in text for text in decoded(encoder, some[0]))
    done = encode_passages(encoder, encoder.open_bank(tmp_path / "bank"), some)
    assert (done.written, done.rejected) == (2, 1)
    assert "passage 'p1': found no pairs" in done.reasons[0]
    endless = {"p0": Augmented("", (Pair("what is " + some[0].text, "that"),))}
    with pytest.raises(DataError, match="found a question of"):
        trainer_of(short, endless).document(some[0])


def test_missing_and_unused_pairs_are_rejected(converted):
    with pytest.raises(ConfigError, match="need a pairs file"):
        trainer_of(converted, None)
    with pytest.raises(ConfigError, match="need no pairs"):
        trainer_of(converted, {}, texts="passage")
    for wrong in ({"texts": "all"}, {"epochs": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AdapterTraining(**wrong)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: found .{., not JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"id": "b", "rewrite": "x"}', "line 2: expected an id, a rewrite"),
        ('{"id": "b", "pairs": [{"question": "x"}]}', "line 2: expected a question and an answer"),
        ('{"id": "a", "pairs": [{"question": "x", "answer": "y"}]}', "line 2: found 'a' a second time"),
    ],
)
def test_errors_in_a_pairs_file_name_the_line(tmp_path: Path, line, message):
    path = tmp_path / "pairs.jsonl"
    right = Augmented("again", (Pair("who?", "he"),))
    path.write_text(json.dumps(right.row("a")) + "\n")
    assert read_pairs(path) == {"a": right}
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_pairs(path)
    with pytest.raises(ConfigError, match="no pairs file"):
        read_pairs(tmp_path / "none")


def test_batching_resuming_and_actors_produce_equal_records(converted, filled, tmp_path: Path):
    encoder, some, location = filled
    stopped = encoder.open_bank(tmp_path / "stopped", precision="float32")
    encode_passages(encoder, stopped, some[:3])
    assert (lambda done: (done.written, done.skipped))(encode_passages(encoder, stopped, some)) == (5, 3)
    with GradientBank(location) as bank:
        ids = [one.id for one in some]
        whole = bank.get(ids)
    assert relative(stopped.get(ids), whole) < 2e-3
    single = trainer_of(converted, encoder.pairs, batch_size=1).encode(some)
    assert relative(torch.from_numpy(np.stack([one.values for one in single])), whole) < 2e-3
    document = encoder.document(some[0])
    sent = {name: np.array([list(values)], "<i4") for name, values in (("ids", document.ids), ("n", document.lengths))}
    rows = {"key": ["k"], "ids": [sent["ids"].tobytes()], "truncated": [False], "lengths": [sent["n"].tobytes()]}
    actor = EncodingActor(lambda: encoder)
    assert relative(torch.from_numpy(actor(rows)["values"]), whole[:1]) < 2e-3
    again = encoder.open_bank(tmp_path / "again", precision="float32")
    encode_passages(encoder, again, some)
    with GradientBank(location) as bank:
        assert dict(record_digests(again)) == dict(record_digests(bank))


def test_export_keeps_the_kind_of_records(filled, tmp_path: Path):
    encoder, _, location = filled
    with GradientBank(location) as bank:
        export(bank, tmp_path / "out")
        again = import_export(tmp_path / "out", tmp_path / "bank", precision="float32")
        assert again.manifest.record == "trained adapter"
        encoder.open_bank(tmp_path / "bank")
        assert torch.equal(again.sum({"p0": 1.0}), bank.sum({"p0": 1.0}))


def test_changed_pairs_count_as_another_text(converted, filled):
    _, some, location = filled
    other = trainer_of(converted, {**pairs_of(some), "p0": Augmented("", (Pair("who?", "nobody"),))})
    with pytest.raises(DuplicatePassageError, match="another text for 'p0'"):
        encode_passages(other, other.open_bank(location), some[:1])


def test_banks_of_different_kinds_are_not_mixed(converted, filled, tmp_path: Path):
    encoder, some, location = filled
    plain = encoder_of(converted)
    gradients = plain.open_bank(tmp_path / "gradients", precision="float32")
    assert "record" not in gradients.manifest.fingerprint  # as in banks written before trained adapters existed
    with GradientBank(location, "a") as bank:
        tries = {
            "a bank of trained adapters for gradients": lambda: plain.open_bank(location),
            "a bank of gradients for trained adapters": lambda: encoder.open_bank(tmp_path / "gradients"),
            "merging": lambda: merge(gradients, [bank]),
            "encoding while asked": lambda: answerer(converted, bank, on_missing="encode"),
            "adding": lambda: answerer(converted, bank).add_passages(some[:1]),
        }
        for name, attempt in tries.items():
            with pytest.raises(FingerprintMismatchError, match="records of another kind") as caught:
                attempt()
            assert caught.value.field == "record", name
    for changed in ({"epochs": 2}, {"learning_rate": 1e-3}, {"texts": "apart"}, {"texts_per_update": 2}):
        with pytest.raises(FingerprintMismatchError, match="another training: found AdamW") as caught:
            trainer_of(converted, encoder.pairs, **changed).open_bank(location)
        assert caught.value.field == "training"
    another = adapted_decoder(prompt="simple", seed=1)
    with GradientBank(location) as bank, pytest.raises(FingerprintMismatchError, match="another adapter:"):
        answerer(another, bank)


def answerer(converted: Any, bank: GradientBank, **options: Any) -> Answerer:
    config: Any = converted.methods[-1].config
    return Answerer(converted.model, converted.tokenizer, bank, config=config, **options)


def test_answers_add_differences_without_step_sizes(converted, filled):
    _, _, location = filled
    with GradientBank(location) as bank:
        engine = answerer(converted, bank)
        asked = [
            Question("who?", ("p0", "p3"), strength=0.5),
            Question("who?", ("p1",)),
            Question("who?", ()),
            Question("who?", ("p0",), adapter=False),
        ]
        recalled = engine.gradient_retriever.retrieve(asked)
        assert torch.equal(recalled[0].delta, 0.5 * (bank.get(["p0"])[0] + bank.get(["p3"])[0]))
        assert torch.equal(recalled[1].delta, bank.get(["p1"])[0])
        together = engine.log_probabilities(recalled, [5, 9])
        one_by_one = [engine.log_probabilities([one], [5, 9])[0] for one in recalled]
        assert together == pytest.approx(one_by_one, abs=1e-4)
        in_place = answerer(converted, bank, in_place=True)
        assert in_place.log_probabilities(recalled, [5, 9]) == pytest.approx(together, abs=1e-4)
        trained = bank.get(["p1"])
        ids = torch.tensor([[*engine.prompts.build(recalled[1].question, (), 2), 5, 9]])
        with torch.no_grad(), updated(converted.model, trained):
            scores = converted.model(ids).logits[0, -3:-1].log_softmax(-1)
        assert together[1] == pytest.approx(float(scores[0, 5] + scores[1, 9]), abs=1e-4)
        moved = [answer.update_norm > 0 for answer in engine.answer(asked, max_new_tokens=3)]
        assert moved == [True, True, False, False]
        assert len(engine.explain(asked[0], max_new_tokens=3)[1]) == 2
        with pytest.raises(MissingGradientError, match="'none'"):
            engine.answer([Question("who?", ("p0", "none"))])
        skipped = answerer(converted, bank, on_missing="skip").answer([Question("who?", ("p0", "none"))])
        assert skipped[0].missing == ("none",)


def test_trained_adapters_apply_after_plain_fine_tuning(converted, filled, tmp_path: Path):
    _, some, location = filled
    settings = EvaluationSettings(batch_size=2, max_new_tokens=2)
    row = Example("1", "who?", "he", ("he",), {"question": "who?", "passages": [some[0].text], "passage_ids": ["p0"]})
    encode_passages(encoder_of(converted), encoder_of(converted).open_bank(tmp_path / "bank"), some[:1])
    for bank, moved in ((location, True), (tmp_path / "bank", False)):
        config = replace(converted.methods[-1].config, outer_loss=False, bank=str(bank))
        with open_answering(converted.model, converted.tokenizer, config, [row], settings) as asking:
            assert (asking.answer([row])[0]["update_norm"] > 0) is moved


def test_answerer_with_adapter_encoder_adds_passages(converted, filled, tmp_path: Path):
    encoder, some, _ = filled
    bank = encoder.open_bank(tmp_path / "bank", precision="float32")
    engine = answerer(converted, bank, encoder=encoder, on_missing="encode")
    assert engine.add_passages(some[:1]).written == 1
    assert engine.answer([Question("who?", tuple(some[:2]))])[0].update_norm > 0
    assert bank.ids() == ["p0", "p1"]


@pytest.mark.parametrize(("texts", "learned"), [("apart", 0.9), ("joined", 0.5)])
def test_trained_adapters_answer_questions_about_their_passages(tmp_path: Path, texts, learned):
    method = toy_method(tmp_path, rank=2, lora_alpha=32.0)
    converted = convert(toy_model(0), method, tokenizer=toy_tokenizer())
    rows = examples(range(50), passages=1, seed=0)
    learned_passages = [Passage(row.key, row.metadata["passages"][0]) for row in rows]
    # the longest possible rewrite in this vocabulary
    pairs = {
        one.id: Augmented(f"in {row.target} lives {row.input} .", (Pair(row.input, row.target),) * 3)
        for one, row in zip(learned_passages, rows, strict=True)
    }
    training = AdapterTraining(texts, epochs=6, learning_rate=3e-3)
    encoder = AdapterEncoder(converted.model, converted.tokenizer, method.config, 50, 4096, training, pairs)
    bank = encoder.open_bank(tmp_path / "bank")
    encode_passages(encoder, bank, learned_passages)
    engine = Answerer(converted.model, converted.tokenizer, bank, config=method.config, batch_size=50)

    def right(shift: int = 0, strength: float = 1.0, together: int = 1) -> float:
        asked = [
            Question(
                row.input, tuple(learned_passages[at - more - shift].id for more in range(together)), strength=strength
            )
            for at, row in enumerate(rows)
        ]
        answers = engine.answer(asked, max_new_tokens=1)
        return sum(one.text == row.target for one, row in zip(answers, rows, strict=True)) / len(rows)

    assert right() >= learned
    assert right(shift=1) <= 0.3
    assert right(strength=0.0) <= 0.3
    # as documented: adapters of several passages interfere on an untrained model
    assert right(together=3) <= 0.3
