"""Label probabilities, constrained generation and faithfulness, against exhaustive or hand-made computations."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from graftwork.core.example import Example
from graftwork.demo import shipped_model
from graftwork.evaluation.prediction import predict_texts as predict
from graftwork.grafting.conversion import convert
from graftwork.methods.wt5 import WT5
from graftwork.methods.wt5.decoding import GrammarProcessor, label_probabilities
from graftwork.methods.wt5.faithfulness import (
    aopc,
    comprehensiveness,
    means,
    measure_faithfulness,
    only_spans,
    sufficiency,
    without_spans,
)
from graftwork.methods.wt5.grammar import grammar_of
from graftwork.methods.wt5.parsing import extractive_explanations
from graftwork.methods.wt5.spelling import pieces
from graftwork.pipeline.loading import load
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks import get_task
from graftwork.tasks.sources import Record

SETTINGS = EvaluationSettings(max_input_tokens=64, max_new_tokens=24, batch_size=3)


@pytest.fixture(scope="module")
def model():
    return load(shipped_model("encoder_decoder"), dtype="float32")


@pytest.fixture(scope="module", params=["shipped", "t5"])
def tokenizer(request):
    if request.param == "shipped":
        return AutoTokenizer.from_pretrained(shipped_model("encoder_decoder"))
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models" / "t5-tokenizer")


@pytest.fixture(scope="module")
def shared():
    from pathlib import Path

    folder = Path(__file__).parents[3].parent / "shared"
    if not (folder / "models" / "t5-tokenizer").is_dir():
        pytest.skip(f"no tokenizer of T5 in {folder}")
    return folder


def movie(text, key="a"):
    fields = {"review": text, "label": 1, "evidences": (), "groups": ()}
    return get_task("movie_rationales_eval_v010").format(Record(key, fields))


TEXTS = ["the pace drags . the plot drags badly", "a joy to watch , start to end", "it is a { set } of lights"]


def test_pieces_of_words_are_pieces_of_the_whole_text(tokenizer):
    text = "positive explanation: the pace drags , badly"
    words = text.split()
    joined = pieces(tokenizer, words[0], first=True)
    for word in words[1:]:
        joined += pieces(tokenizer, word)
    assert list(joined) == tokenizer(text, add_special_tokens=False)["input_ids"]


def follow(grammar, ids):
    states = grammar.start
    for piece in ids:
        if not grammar.is_free(states) and piece not in grammar.allowed(states):
            return None
        states = grammar.advance(states, piece)
    return states


def accepts(grammar, tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    states = follow(grammar, ids)
    return states is not None and grammar.end in grammar.allowed(states)


def test_a_text_is_allowed_exactly_if_it_is_a_label_and_spans_of_the_source(tokenizer):
    source = "the pace drags the plot"
    grammar = grammar_of(tokenizer, movie(source))
    words = source.split()
    spans = {" ".join(words[i:j]) for i in range(5) for j in range(i + 1, 6)}
    for length in (1, 2, 3):
        for chosen in itertools.product(dict.fromkeys(words), repeat=length):
            text = " ".join(chosen)
            assert accepts(grammar, tokenizer, f"negative explanation: {text}") == (text in spans), text
    assert accepts(grammar, tokenizer, "positive")
    assert accepts(grammar, tokenizer, "positive explanation: the plot explanation: the pace drags")
    assert not accepts(grammar, tokenizer, "positive explanation:")
    assert not accepts(grammar, tokenizer, "neutral")
    assert not accepts(grammar, tokenizer, "positive explanation: pac")


def test_the_source_may_contain_the_separator_word(tokenizer):
    grammar = grammar_of(tokenizer, movie("no explanation: none needed"))
    assert accepts(grammar, tokenizer, "positive explanation: no explanation: none")


def test_without_the_request_nothing_but_the_label_is_allowed(tokenizer):
    row = get_task("movie_rationales_v010_no_expl").format(
        Record("a", {"review": "the plot", "label": 0, "evidences": ()})
    )
    grammar = grammar_of(tokenizer, row)
    assert accepts(grammar, tokenizer, "negative")
    assert not accepts(grammar, tokenizer, "negative explanation: the plot")


def test_free_reasons_follow_the_choices_of_the_example(tokenizer):
    fields = {"question": "Q", "choices": ("boot", "boot room"), "answer": "boot", "abstractive_explanation": "e"}
    grammar = grammar_of(tokenizer, get_task("cos_e_eval_v001").format(Record("a", fields)))
    for label in ("boot", "boot room"):
        assert accepts(grammar, tokenizer, label)
    states = follow(grammar, tokenizer("boot room explanation: anything", add_special_tokens=False)["input_ids"])
    assert grammar.is_free(states)
    assert not accepts(grammar, tokenizer, "kitchen")


def test_the_processor_skips_unconstrained_rows_and_supports_beams(tokenizer):
    row = movie(TEXTS[0])
    processor = GrammarProcessor([grammar_of(tokenizer, row), None])
    scores = torch.zeros(4, len(tokenizer))
    filtered = processor(torch.zeros(4, 1, dtype=torch.long), scores)
    first = {pieces(tokenizer, label, first=True)[0] for label in ("negative", "positive")}
    for beam in (0, 1):
        assert set(filtered[beam].isfinite().nonzero().flatten().tolist()) == first
    assert filtered[2:].isfinite().all()


@pytest.mark.parametrize("limit", [6, 9, 12, 17])
def test_a_constrained_answer_ends_in_time_with_a_whole_span(tokenizer, limit):
    """Holds for every model and limit: the scores here prefer random tokens to the end token."""
    row = movie("the unbelievable pace drags unbearably . the plot drags badly")
    for seed in range(20):
        processor = GrammarProcessor([grammar_of(tokenizer, row)], limit)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(1, 1, dtype=torch.long)
        while ids.shape[1] <= limit and ids[0, -1] != tokenizer.eos_token_id:
            wishes = torch.rand(1, len(tokenizer), generator=generator)
            wishes[0, tokenizer.eos_token_id] = -1
            ids = torch.cat([ids, processor(ids, wishes).argmax(-1, keepdim=True)], dim=1)
        assert ids[0, -1] == tokenizer.eos_token_id
        answer = tokenizer.decode(ids[0], skip_special_tokens=True)
        parsed = extractive_explanations(answer, example={"source": row.metadata["source"], "inputs_pretokenized": ""})
        assert parsed["unmatched"] == 0, answer


def test_a_constrained_answer_ends_at_a_span_that_it_repeats(tokenizer):
    processor = GrammarProcessor([grammar_of(tokenizer, movie("the plot drags , the plot drags on"))])
    separator = pieces(tokenizer, "explanation:")

    def next_pieces(text):
        ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        scores = processor(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))
        return set(scores[0].isfinite().nonzero().flatten().tolist())

    end = tokenizer.eos_token_id
    assert {end, separator[0]} < next_pieces("negative explanation: the plot")
    assert separator[0] in next_pieces("negative explanation: the plot explanation: the plot drags")
    assert next_pieces("negative explanation: the plot explanation: drags explanation: the plot") == {end}


@pytest.mark.parametrize("beams", [1, 3])
def test_constrained_answers_are_labels_and_spans_for_an_untrained_model(model, beams):
    """The shipped model is not trained on this task and generates other text without constraints."""
    rows = [movie(text, str(number)) for number, text in enumerate(TEXTS)]
    settings = EvaluationSettings(max_input_tokens=64, max_new_tokens=24, batch_size=3, num_beams=beams)
    free = predict(convert(model, WT5()), rows, settings)
    held = predict(convert(model, WT5(constrained=True)), rows, settings)
    assert any(text.split()[:1] not in (["negative"], ["positive"]) for text in free)
    for row, text in zip(rows, held, strict=True):
        assert text.split()[0] in ("negative", "positive")
        example = {"inputs_pretokenized": row.input, "source": row.metadata["source"]}
        if not text.endswith("explanation:"):
            found = extractive_explanations(text, example=example, tokenizer="whitespace")
            cut = len(model.tokenizer(text)["input_ids"]) > 24
            assert found["unmatched"] == 0 or cut


def test_label_probabilities_are_those_of_scoring_each_label_alone(model):
    rows = [movie(text, str(number)) for number, text in enumerate(TEXTS)]
    tokenizer = model.tokenizer
    found = label_probabilities(model.model, tokenizer, rows, batch_size=2, max_input_tokens=64)
    for row, own in zip(rows, found, strict=True):
        ids = tokenizer(row.input, return_tensors="pt", truncation=True, max_length=64)["input_ids"]
        scores = []
        for label in ("negative", "positive"):
            target = tokenizer(f"{label} explanation:", add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits = model.model(input_ids=ids, labels=target).logits.detach()[0].log_softmax(-1)
            scores.append(sum(logits[place, piece] for place, piece in enumerate(target[0])))
        expected = torch.stack(scores).softmax(0)
        assert list(own) == ["negative", "positive"]
        torch.testing.assert_close(torch.tensor(list(own.values())), expected, rtol=1e-4, atol=1e-5)


def test_without_a_request_a_label_is_scored_with_the_end_token(model):
    row = get_task("movie_rationales_v010_no_expl").format(
        Record("a", {"review": "the plot", "label": 0, "evidences": ()})
    )
    tokenizer = model.tokenizer
    found = label_probabilities(model.model, tokenizer, [row], batch_size=2, max_input_tokens=64)[0]
    ids = tokenizer(row.input, return_tensors="pt")["input_ids"]
    scores = []
    for label in ("negative", "positive"):
        target = tokenizer(label, return_tensors="pt")["input_ids"]
        assert target[0, -1] == tokenizer.eos_token_id
        logits = model.model(input_ids=ids, labels=target).logits.detach()[0].log_softmax(-1)
        scores.append(sum(logits[place, piece] for place, piece in enumerate(target[0])))
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.stack(scores).softmax(0), rtol=1e-4, atol=1e-5)


def test_m7_faithfulness_of_three_probabilities():
    assert comprehensiveness(0.90, 0.35) == pytest.approx(0.55)
    assert sufficiency(0.90, 0.80) == pytest.approx(0.10)
    assert aopc([0.02, 0.05, 0.10, 0.30, 0.53]) == pytest.approx(0.20)


def test_removing_tokens_leaves_prompt_question_and_answer():
    fields = {
        "passage": "one day .\nthe  cat left .",
        "query_and_answer": "who left ? || the cat",
        "label": 1,
        "evidences": (),
        "groups": (),
    }
    row = get_task("eraser_multi_rc_eval_v011").format(Record("a", fields))
    frame = "explain multirc passage: {} query: who left ? answer: the cat"
    # characters of "one day .", "the  cat" and "one"
    assert without_spans(row, [(10, 18)]).input == frame.format("one day . left .")
    assert without_spans(row, [(0, 9)]).input == frame.format("the cat left .")
    assert without_spans(row, [(10, 18)], mask="<x>").input == frame.format("one day . <x> <x> left .")
    assert without_spans(without_spans(row, [(0, 3)]), [(0, 3)]).input == frame.format(". the cat left .")
    assert only_spans(row, [(10, 18), (0, 3)]).input == frame.format("one the cat")


def test_faithfulness_uses_the_predicted_label_with_and_without_its_spans():
    def probabilities(rows):
        # the label depends on one word only
        return [
            {"negative": 0.9, "positive": 0.1} if "drags" in row.input else {"negative": 0.2, "positive": 0.8}
            for row in rows
        ]

    rows = [movie("the pace drags on"), movie("the pace drags on"), movie("fine"), movie("fine")]
    full = probabilities(rows)
    labels = ["negative", "negative", "positive", "maybe"]
    # "drags", "the pace" and "fine"
    spans = [[(9, 14)], [(0, 8)], [], [(0, 4)]]
    found = measure_faithfulness(rows, labels, spans, probabilities, full=full)
    assert found[0] == pytest.approx((0.7, 0.0))
    assert found[1] == pytest.approx((0.0, 0.7))
    assert found[2:] == [None, None]
    assert means(found) == pytest.approx({"comprehensiveness": 0.35, "sufficiency": 0.35})
    assert means([None]) == {}


def test_an_answer_without_a_task_is_parsed(model):
    examined = WT5().examine(
        model.model,
        model.tokenizer,
        None,
        [Example("1", "explain x", "")],
        [{"prediction": "a explanation: b"}],
        SETTINGS,
    )
    assert examined.rows[0]["label"] == "a"
    assert examined.rows[0]["explanations"] == ["b"]
    assert "right" not in examined.rows[0]
