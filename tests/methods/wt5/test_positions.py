"""Positions from reader to metric: gold spans survive every tokenizer, and constrained answers are always found."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from graftwork.core.example import Examples
from graftwork.demo import shipped_model
from graftwork.methods.wt5.decoding import GrammarProcessor
from graftwork.methods.wt5.grammar import grammar_of
from graftwork.methods.wt5.reading import read_answer
from graftwork.metrics.spans import merge_spans
from graftwork.tasks import get_task
from graftwork.tasks.offsets import encode_texts
from graftwork.tasks.sources import Record
from graftwork.tasks.spans import find_text, token_spans, word_places
from graftwork.training.encoding import EncodedExamples

SHARED = Path(__file__).parents[3].parent / "shared" / "models"
TOKENIZERS = ("shipped", "byt5", "t5-tokenizer", "bert-base-uncased-tokenizer", "roberta-base-tokenizer",
              "gpt2-tokenizer", "stories260K")  # fmt: skip
DOCUMENTS = {
    "tab": "the script\tcreaks . still , the leads are charming .",
    "no-break space": "the\u00a0script creaks .\u00a0 still , the leads are charming .",
    "next line": "the script\u0085creaks . still , the leads are charming .",
    "thin space": "the script\u2009creaks . the leads\u2009are charming .",
    "line separator": "the script creaks .\u2028still , the leads are charming .",
    "accent": "a stroll through Olhão at dawn , and nothing else .",
    "ellipsis": "it starts well … and then it drags on … for hours .",
    "ligature": "a ﬁne ﬁlm about a ﬁre in the ofﬁce .",
    "full width": "the ＦＩＬＭ is ｇｒｅａｔ , all in all .",
    "greek": "the τέλος of the film is a λόγος on time .",
    "cjk": "the title 日本語 is shown twice before the end .",
    "control token": "a film </s> that ends <pad> before it begins .",
    "untokenised": "Stay home. A lazy sequel. (Really!) It's U.S.-made, isn't it?",
    "separator": "the trailer says explanation: none , and the film has no explanation: at all .",
    "markup": "it is a { set } of <b>lights</b> ~ \\ and ^ more .",
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    if request.param == "byt5":
        return ByT5Tokenizer()
    if request.param == "shipped":
        return AutoTokenizer.from_pretrained(shipped_model("encoder_decoder"))
    if not (SHARED / request.param).is_dir():
        pytest.skip(f"no {request.param} in {SHARED}")
    found = AutoTokenizer.from_pretrained(SHARED / request.param)
    if found.eos_token_id is None:
        # BERT has no end-of-sequence token
        found.eos_token = found.sep_token
    return found


def row_of(text, spans, key="a"):
    fields = {"review": text, "label": 1, "span_offsets": tuple(spans)}
    return get_task("movie_rationales_eval_v010").format(Record(key, fields))


def spans_of(text, generator):
    """One to three spans that begin and end at word boundaries and do not touch."""
    places = word_places(text)
    found = []
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(places))
        end = min(len(places), start + generator.randint(1, 5))
        found.append((places[start][0], places[end - 1][1]))
    return [(s, e) for s, e in merge_spans(found) if s < e]


@pytest.mark.parametrize("lead", ["", " "], ids=["encoder-decoder", "decoder"])
def test_gold_spans_are_read_back_from_the_tokens_of_the_target(tokenizer, lead):
    generator = random.Random(0)
    rows = [
        row_of(text, spans_of(text, generator), f"{name} {number}")
        for name, text in DOCUMENTS.items()
        for number in range(6)
    ]
    task = get_task("movie_rationales_eval_v010")
    encoded = EncodedExamples(rows, tokenizer, encoder_decoder=not lead, max_input_tokens=2048, max_target_tokens=512)
    answers = []
    for index, row in enumerate(rows):
        grammar = grammar_of(tokenizer, row, lead=lead)
        ids = [token for token in encoded[index]["labels"] if token != -100]
        answers.append(read_answer(tokenizer, grammar, row, ids))
        assert answers[-1]["unmatched"] == 0, row
    examples = Examples(task.name, "validation", rows, len(rows), 0, "made")
    scores = task.evaluate([""] * len(rows), examples, located=answers)
    assert scores["accuracy"] == 100
    unlike = [
        (row.key, row.metadata["explanations"], found["explanations"])
        for row, found in zip(rows, answers, strict=True)
        if places(row, row.metadata["spans"]) != places(row, found["spans"])
    ]
    assert not [one for one in unlike if one[1] != tuple(one[2])], unlike
    # a text that occurs twice may be found at its other place
    assert scores["token_f1"] > 95


def places(row, spans):
    return sorted(token_spans([tuple(span) for span in spans], word_places(row.metadata["source"])))


def test_each_gold_span_of_distinct_words_scores_100(tokenizer):
    """Without repeated words, positions are unique: all scores are exactly 100."""
    task = get_task("movie_rationales_eval_v010")
    texts = {
        "untokenised": ("Stay home. A lazy sequel.", ["lazy sequel"]),
        "tab": ("the script\tcreaks . still , these leads are charming", ["script\tcreaks", "these leads"]),
        "accent": ("a stroll through Olhão at dawn", ["through Olhão at"]),
        "cjk": ("the title 日本語 is shown twice", ["title 日本語 is"]),
        "control token": ("one film </s> that ends", ["film </s> that"]),
        "separator": ("it says explanation: none", ["says explanation: none"]),
    }
    rows = []
    for name, (text, quoted) in texts.items():
        rows.append(row_of(text, [(text.index(one), text.index(one) + len(one)) for one in quoted], name))
    answers = []
    for row in rows:
        ids = encode_texts(tokenizer, [row.target], automatic=False)[0]
        answers.append(read_answer(tokenizer, grammar_of(tokenizer, row), row, ids))
    for row, found in zip(rows, answers, strict=True):
        assert [tuple(span) for span in found["spans"]] == list(row.metadata["spans"]), (row.key, found)
    examples = Examples(task.name, "validation", rows, len(rows), 0, "made")
    scores = task.evaluate([""] * len(rows), examples, located=answers)
    assert (scores["accuracy"], scores["token_f1"], scores["span_f1"], scores["iou_f1"]) == (100, 100, 100, 100)


def constrained_samples(tokenizer, count):
    """Random constrained generations: the scores prefer random tokens to the end token."""
    rows = [row_of(text, [], name) for name, text in DOCUMENTS.items()]
    vocabulary = max(len(tokenizer), 400)
    for number in range(count):
        row = rows[number % len(rows)]
        grammar = grammar_of(tokenizer, row)
        generator = torch.Generator().manual_seed(number)
        limit = 24 + number % 40
        processor = GrammarProcessor([grammar], limit)
        ids = torch.zeros(1, 1, dtype=torch.long)
        while (ids.shape[1] <= limit and ids[0, -1] != grammar.end) or ids.shape[1] == 1:
            wishes = torch.rand(1, vocabulary, generator=generator)
            wishes[0, grammar.end] *= 0.9
            ids = torch.cat([ids, processor(ids, wishes).argmax(-1, keepdim=True)], dim=1)
        yield row, read_answer(tokenizer, grammar, row, ids[0, 1:].tolist())


def check_samples(tokenizer, count):
    explained = 0
    for row, found in constrained_samples(tokenizer, count):
        source = row.metadata["source"]
        assert found["label"] in row.metadata["choices"]
        assert found["unmatched"] == 0
        for (start, end), text in zip(found["spans"], found["explanations"], strict=True):
            assert 0 <= start < end <= len(source)
            assert source[start:end].split() == text.split()
        explained += bool(found["spans"])
    assert explained


def test_constrained_samples_are_labels_and_spans(tokenizer):
    check_samples(tokenizer, 15)


@pytest.mark.long
def test_none_of_1000_constrained_samples_is_unmatched(tokenizer):
    check_samples(tokenizer, 1000)


def test_a_lower_casing_tokenizer_has_the_right_labels():
    if not (SHARED / "bert-base-uncased-tokenizer").is_dir():
        pytest.skip(f"no tokenizer of BERT in {SHARED}")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "bert-base-uncased-tokenizer")
    tokenizer.eos_token = tokenizer.sep_token
    task = get_task("eraser_multi_rc_eval_v011")
    fields = {"passage": "The Cat left .", "query_and_answer": "Who ? || Cat", "label": 1, "evidences": ("The Cat",)}
    row = task.format(Record("a", fields))
    (ids,) = encode_texts(tokenizer, [row.target], automatic=False)
    assert tokenizer.decode(ids).startswith("true")
    found = read_answer(tokenizer, grammar_of(tokenizer, row), row, ids)
    assert (found["label"], found["spans"]) == ("True", [[0, 7]])


@pytest.mark.parametrize(
    ("source", "quoted", "expected"),
    [
        ("Stay home. A lazy sequel.", "lazy sequel", (13, 24)),
        ("the pace , the pacer", "pace", (4, 8)),
        ("party of art", "art", (9, 12)),
        ("one\u00a0two\tthree", "two three", (4, 13)),
        ("a ﬁne ﬁlm", "fine film", (2, 9)),
        ("it is a { set } of", "a set of", (6, 18)),
        ("see 日本語 now", "本", (5, 6)),
        ("the pace", "pac", None),
        ("the pace", "...", None),
    ],
)
def test_a_quoted_text_is_found(source, quoted, expected):
    assert find_text(source, quoted) == (expected, expected is not None)


def test_a_second_quote_of_the_same_text_is_its_next_place():
    assert find_text("so so", "so", [(0, 2)]) == ((3, 5), True)
    assert find_text("so so", "so", [(0, 2), (3, 5)]) == (None, True)
