"""Batched answers equal single answers, and answering changes no weight."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch

from graftwork.errors import ConfigError, DataError
from graftwork.grafting.conversion import restore
from graftwork.methods.regrad.answering import digests
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.in_place import InPlaceUpdater, NestedUpdateError, WeightsChangedError
from graftwork.methods.regrad.bank.errors import FingerprintMismatchError, MissingGradientError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import encode_passages
from graftwork.methods.regrad.modules import step_sizes
from graftwork.methods.regrad.text.prompting import family_for, question_ids
from graftwork.methods.regrad.text.requests import Question
from graftwork.retrieval import Passage
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from regrad_engine import adapted_decoder, encoder_of, passages

TEXT = "where was the baker born ?"


@pytest.fixture(scope="module")
def converted():
    return adapted_decoder()


@pytest.fixture(scope="module")
def some(converted):
    return passages(converted, 12)


@pytest.fixture(scope="module")
def folder(converted, some, tmp_path_factory) -> Path:
    """Bank of all passages but the last."""
    folder = tmp_path_factory.mktemp("bank") / "bank"
    encoder = encoder_of(converted)
    encode_passages(encoder, encoder.open_bank(folder, precision="float32"), some[:-1])
    return folder


@pytest.fixture
def bank(folder: Path):
    with GradientBank(folder) as reader:
        yield reader


def answerer(converted, bank=None, retriever=None, **options) -> Answerer:
    return Answerer(
        converted.model, converted.tokenizer, bank, retriever, config=converted.methods[-1].config, **options
    )


def mixed_questions(count: int, seed: int = 0) -> list[Question]:
    draw = random.Random(seed)
    return [
        Question(
            f"{TEXT} {draw.choice(['when', 'who', 'what'])} {' now' * draw.randint(0, 5)}",
            tuple(f"p{draw.randrange(11)}" for _ in range(draw.randint(0, 4))),
            strength=draw.choice([0.0, 0.5, 1.0, -1.0]),
            adapter=draw.random() < 0.85,
            context=draw.random() < 0.3,
        )
        for _ in range(count)
    ]


def logits_of(model, call) -> list[torch.Tensor]:
    """Logits of the last position at every decoding step."""
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[:, -1].clone()))
    try:
        call()
    finally:
        handle.remove()
    return seen


def test_batched_answers_equal_single_answers(converted, bank):
    engine = answerer(converted, bank)
    questions = [
        *(Question(TEXT, (f"p{number}", f"p{number + 1}")) for number in range(4)),
        Question(TEXT, ()),
        Question(TEXT, ("p0", "p1"), strength=0.0),
        Question(TEXT, ("p0",), adapter=False),
        Question("who ?", ("p5",), strength=-2.0),
        Question(TEXT, ("p2", "p9", "p4"), context=True),
    ]
    texts = [engine.answer([one])[0] for one in questions]
    alone = [logits_of(converted.model, lambda one=one: engine.answer([one])) for one in questions]
    together = engine.answer(questions)
    assert [one.text for one in together] == [one.text for one in texts]
    assert [one.generated for one in together] == [one.generated for one in texts]
    batch = logits_of(converted.model, lambda: engine.answer(questions))
    order = sorted(
        range(len(questions)), key=lambda n: -len(engine.prompts.build(questions[n], together[n].passages, 20))
    )
    for number in order:
        for step, expected in enumerate(alone[number]):
            # rows leave the batch with their last token
            row = [one for one in order if together[one].tokens > step].index(number)
            assert float((batch[step][row] - expected[0]).abs().max()) <= 1e-5, (number, step)
    # different updates give different logits, otherwise nothing was compared
    firsts = torch.stack([steps[0][0] for steps in alone[:6]])
    assert float(torch.cdist(firsts, firsts).fill_diagonal_(9).min()) == 0.0  # no passages and strength 0 are equal
    assert float(torch.cdist(firsts[:5], firsts[:5]).fill_diagonal_(9).min()) > 1e-3


def test_update_is_the_step_on_the_sum_of_gradients(converted, bank):
    engine = answerer(converted, bank)
    for strength in (1.0, -0.25):
        found = engine.gradient_retriever.retrieve([Question(TEXT, ("p3", "p1", "p7", "p1"), strength=strength)])[0]
        total = sum(bank.get([name])[0].double() for name in ("p1", "p3", "p7"))
        expected = -strength * step_sizes(converted.model).detach().double() * total
        assert torch.allclose(found.delta.double(), expected, rtol=1e-6, atol=1e-9)
        assert found.update_norm == pytest.approx(float(expected.norm()), rel=1e-6)


def test_update_is_bitwise_independent_of_the_order_of_passages(converted, bank):
    engine = answerer(converted, bank)
    names = [f"p{number}" for number in range(8)]
    first = engine.gradient_retriever.retrieve([Question(TEXT, tuple(names))])[0]
    for seed in range(3):
        shuffled = random.Random(seed).sample(names, len(names))
        other = engine.gradient_retriever.retrieve([Question(TEXT, tuple(shuffled))])[0]
        assert torch.equal(first.delta, other.delta)
        assert engine.generate([first])[0].generated == engine.generate([other])[0].generated


def test_strength_zero_equals_the_adapter_and_adapter_off_the_pretrained_model(converted, bank):
    engine = answerer(converted, bank)
    config = converted.methods[-1].config
    prompt = torch.tensor([question_ids(converted.tokenizer, family_for(config, "open"), TEXT)])
    questions = {"zero": Question(TEXT, ("p0", "p1"), strength=0.0), "off": Question(TEXT, ("p0",), adapter=False)}
    found = {name: logits_of(converted.model, lambda one=one: engine.answer([one])) for name, one in questions.items()}
    dense = adapted_decoder()
    restore(dense)
    expected = {
        name: logits_of(
            model,
            lambda model=model: model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True, max_new_tokens=20
            ),
        )
        for name, model in (("zero", converted.model), ("off", dense.model))
    }
    for name, steps in found.items():
        for step, logits in enumerate(steps):
            assert float((logits - expected[name][step]).abs().max()) <= 1e-6, (name, step)
    assert float((expected["zero"][0] - expected["off"][0]).abs().max()) > 1e-3


@pytest.mark.parametrize("in_place", [False, True])
def test_answering_200_mixed_questions_changes_no_weight(converted, bank, in_place):
    engine = answerer(converted, bank, in_place=in_place, check_every=20)
    before = engine.weights_digest()
    questions = mixed_questions(200)
    draw, start = random.Random(1), 0
    while start < len(questions):
        size = draw.randint(1, 16)
        engine.answer(questions[start : start + size], max_new_tokens=2)
        start += size
    assert engine.weights_digest() == before
    with torch.no_grad():
        weight = converted.model.lm_head.weight
        kept = weight[0, 0].clone()
        weight[0, 0] += 1e-3
        assert engine.weights_digest() != before
        weight[0, 0] = kept
    assert engine.weights_digest() == before


@pytest.mark.parametrize("in_place", [False, True])
def test_failed_cancelled_and_concurrent_questions_change_no_weight(converted, bank, in_place):
    engine = answerer(converted, bank, in_place=in_place)
    before, questions = engine.weights_digest(), mixed_questions(24, seed=4)
    expected = [one.text for one in engine.answer(questions, max_new_tokens=6)]
    calls = []

    def fail(number: int) -> bool:
        calls.append(number)
        if len(calls) > 3:
            raise TimeoutError("raised between two tokens")
        return False

    with pytest.raises(TimeoutError):
        engine.answer(questions[:4], max_new_tokens=6, cancelled=fail)
    assert engine.weights_digest() == before
    broken = engine.answer(questions[:4], max_new_tokens=6, cancelled=lambda number: number == 2)
    assert [one.cancelled for one in broken] == [False, False, True, False]
    assert broken[2].tokens == 1
    assert [one.text for one in broken if not one.cancelled] == [expected[0], expected[1], expected[3]]
    found: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        part = questions[number::2]
        found[number] = [one.text for one in engine.answer(part, max_new_tokens=6)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected[::2], 1: expected[1::2]}
    assert engine.weights_digest() == before


def test_in_place_answers_equal_batched_answers(converted, bank):
    questions = mixed_questions(10, seed=7)
    handed = answerer(converted, bank).answer(questions, max_new_tokens=5)
    written = answerer(converted, bank, in_place=True).answer(questions, max_new_tokens=5)
    assert [one.generated for one in written] == [one.generated for one in handed]


def test_nested_updates_are_rejected_and_changed_weights_stop_answering(converted):
    own = adapted_decoder()
    updater = InPlaceUpdater(own.model)
    delta = torch.ones_like(step_sizes(own.model))
    with updater.applied(delta), pytest.raises(NestedUpdateError, match="one at a time"), updater.applied(delta):
        pass
    with updater.applied(None):
        assert updater.healthy
    engine = answerer(own, in_place=True, check_every=1)
    question = Question(TEXT, ())
    engine.answer([question], max_new_tokens=1)
    with torch.no_grad():
        own.model.lm_head.weight[3, 3] += 1
    with pytest.raises(WeightsChangedError):
        engine.answer([question], max_new_tokens=1)
    assert not engine.healthy
    with torch.no_grad():
        own.model.lm_head.weight[3, 3] -= 1
    with pytest.raises(WeightsChangedError, match="Load the model again"):
        engine.answer([question], max_new_tokens=1)


def test_weights_compared_in_parts_are_all_compared(converted, monkeypatch):
    """Whichever byte has changed, calls whose shares add up to 1 find it, and each compares a part only."""
    monkeypatch.setattr(digests, "PART_BYTES", 20_000)
    tensors = dict(converted.model.named_parameters())
    checker = digests.WeightsChecker(converted.model)
    parts = len(checker._parts)
    assert parts > len(tensors)
    hashed = []
    own = digests._part_digest
    monkeypatch.setattr(digests, "_part_digest", lambda *given: hashed.append(given) or own(*given))
    for calls in (3, 7, 1000):
        hashed.clear()
        assert all(checker.check(1 / calls) for _ in range(calls))
        assert len({(id(tensor), start) for tensor, start in hashed}) == len(hashed) == parts
    for name in (next(iter(tensors)), list(tensors)[-1]):
        with torch.no_grad():
            tensors[name].view(-1)[-1] += 1
            assert not all(checker.check(1 / 7) for _ in range(7)), name
            tensors[name].view(-1)[-1] -= 1
        checker = digests.WeightsChecker(converted.model)


def test_check_weights_detects_a_changed_weight(converted):
    own = adapted_decoder()
    engine = answerer(own)
    assert engine.check_weights()
    with torch.no_grad():
        own.model.model.norm.weight[0] += 1
    assert not engine.check_weights()
    with pytest.raises(WeightsChangedError):
        engine.answer([Question(TEXT, ())])


def test_missing_passage_raises_is_skipped_or_is_encoded(converted, folder, some, tmp_path: Path):
    import shutil

    copy = tmp_path / "bank"
    shutil.copytree(folder, copy)
    missing = some[-1]
    with GradientBank(copy) as reader:
        with pytest.raises(MissingGradientError, match="'p11'"):
            answerer(converted, reader).answer([Question(TEXT, ("p1", missing))])
        skipped = answerer(converted, reader, on_missing="skip").answer([Question(TEXT, ("p1", missing))])[0]
        assert skipped.missing == ("p11",)
        assert skipped.generated == answerer(converted, reader).answer([Question(TEXT, ("p1",))])[0].generated
        computed = answerer(converted, reader, on_missing="encode").gradient_retriever.retrieve(
            [Question(TEXT, ("p1", missing))]
        )[0]
        assert computed.missing == ()
        assert not reader.contains(["p11"])["p11"]
        with pytest.raises(MissingGradientError, match="'p11'"):
            answerer(converted, reader, on_missing="encode").answer([Question(TEXT, ("p11",))])
    engine = answerer(converted, GradientBank(copy, "a"), on_missing="encode")
    kept = engine.gradient_retriever.retrieve([Question(TEXT, ("p1", missing))])[0]
    assert torch.allclose(kept.delta, computed.delta, rtol=1e-5, atol=1e-9)
    assert GradientBank(copy, "a").contains(["p11"])["p11"]
    assert torch.equal(
        answerer(converted, GradientBank(copy, "a"))
        .gradient_retriever.retrieve([Question(TEXT, ("p1", "p11"))])[0]
        .delta,
        kept.delta,
    )
    with pytest.raises(ConfigError, match="on_missing 'omit'"):
        answerer(converted, None, on_missing="omit")


def test_added_passages_are_retrieved_and_deleted_ones_are_not(converted, some, tmp_path: Path):
    rows = "\n".join(f'{{"_id": "{one.id}", "text": "{one.text}", "title": ""}}' for one in some)
    (tmp_path / "corpus.jsonl").write_text(rows + "\n")
    build_embedded(str(tmp_path / "corpus.jsonl"), tmp_path / "index")
    encoder = encoder_of(converted)
    bank = encoder.open_bank(tmp_path / "bank")
    encode_passages(encoder, bank, [Passage(one.id, one.text) for one in some])
    engine = answerer(converted, bank, EmbeddedIndex(tmp_path / "index"))
    question = Question("who is zorbanax ?", count=1)
    before = engine.answer([question])[0]
    assert before.passages == ()
    new = Passage("new", "zorbanax is the baker of the town and was born in april", "zorbanax")
    assert engine.add_passages([new]).written == 1
    assert engine.add_passages([new]).skipped == 1
    with_it = engine.answer([question])[0]
    assert [hit.id for hit in with_it.passages] == ["new"]
    assert with_it.update_norm > 0
    assert engine.delete_passages(["new", "unknown"]) == ("unknown",)
    after = engine.answer([question])[0]
    assert (after.generated, after.passages) == (before.generated, before.passages)
    again = answerer(converted, GradientBank(tmp_path / "bank"), EmbeddedIndex(tmp_path / "index"))
    assert again.answer([question])[0].generated == before.generated
    with pytest.raises(ConfigError, match="open for reading"):
        again.add_passages([new])


def test_influence_equals_leave_one_out_by_hand(converted, bank):
    engine = answerer(converted, bank)
    question = Question(TEXT, ("p2", "p6"), context=True)
    answer, influences = engine.explain(question, max_new_tokens=4)
    assert [one.id for one in influences] == ["p2", "p6"]
    # by hand: the update of the other passage alone, written into the model
    whole = engine.log_probabilities(engine.gradient_retriever.retrieve([question]), answer.generated)[0]
    for influence, other in zip(influences, ("p6", "p2"), strict=True):
        left = engine.gradient_retriever.retrieve([Question(TEXT, (other,), context=True)])[0]
        written = answerer(converted, bank, in_place=True).log_probabilities([left], answer.generated)[0]
        assert influence.log_probability == pytest.approx(written, abs=1e-4)
        assert influence.change == pytest.approx(whole - written, abs=1e-4)
    assert engine.explain(Question(TEXT, ()))[1] == []


def test_bank_of_another_adapter_is_rejected(converted, bank):
    other = adapted_decoder(seed=5)
    with pytest.raises(FingerprintMismatchError, match="adapter"):
        answerer(other, bank)


def test_prompts_are_truncated_to_the_context(converted):
    engine = answerer(converted, context_tokens=40)
    long = [Passage(f"l{number}", " ".join(["baker"] * 30)) for number in range(3)]
    hits = engine.gradient_retriever.passages([Question(TEXT, tuple(long))])[0]
    blind = engine.prompts.build(Question(TEXT), hits, 20)
    shown = engine.prompts.build(Question(TEXT, context=True), hits, 20)
    assert len(blind) < len(shown) <= len(blind) + 40
    with pytest.raises(DataError, match="expected at most 492"):
        engine.answer([Question("baker " * 600, ())])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": " "}, "without text"),
        ({"strength": float("nan")}, "finite"),
        ({"count": -1}, "0 or more"),
        ({"kind": "essay"}, "open, yes_no, choice"),
        ({"kind": "choice", "choices": ("a",)}, "expected five"),
    ],
)
def test_invalid_questions_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        Question(**{"text": TEXT, **changes})
