"""Parsing of generated text: cases O1 to O9 of the specification, sections 2.1 and 6, in both modes."""

import pytest

from graftwork.errors import ConfigError
from graftwork.methods.wt5.parsing import (
    abstractive_explanations,
    extractive_explanations,
    string_label_to_class_id,
    tokenizer_named,
)

MODES = pytest.mark.parametrize("mode", ["fixed", "reference"])
PACE = "explain sentiment review: the pace drags . the pace drags badly near the end . skip this one ."
spacy = pytest.importorskip("spacy", reason="the tokens of the paper need the extra wt5")


def read(text, source, *, mode, tokenizer="spacy", own_source=None, **options):
    """Parse a text with `extractive_explanations`.

    Args:
        text: Generated text.
        source: Input of the model.
        mode: Mode of the parser.
        tokenizer: Tokenizer of the parser.
        own_source: Source text to search instead of the input.
        options: Further arguments of the parser.
    """
    example = {"inputs_pretokenized": source, **({} if own_source is None else {"source": own_source})}
    return extractive_explanations(text, example=example, tokenizer=tokenizer, mode=mode, **options)


def ones(result):
    return [position for position, value in enumerate(result["span_array"]) if value]


@MODES
def test_o1_label_and_two_explanations(mode):
    text = "goodnight sun explanation: because it set explanation: it got dark"
    expected = {"label": "goodnight sun", "explanations": ["because it set", "it got dark"]}
    assert abstractive_explanations(text, mode=mode) == expected
    assert abstractive_explanations(text, mode=mode, example={"x": 1}, is_target=True) == expected


@pytest.mark.parametrize(
    ("text", "reference", "fixed"),
    [
        ("a explanation: b explanation: c", ("a", ["b", "c"]), ("a", ["b", "c"])),
        ("a", ("a", []), ("a", [])),
        ("", ("", []), ("", [])),
        ("a explanation:", ("a explanation:", []), ("a", [])),
        ("a Explanation: b", ("a Explanation: b", []), ("a Explanation: b", [])),
        (" explanation: b", ("", ["b"]), ("", ["b"])),
        ("explanation: b", ("explanation: b", []), ("", ["b"])),
        ("a explanation: b explanation: c explanation: d", ("a", ["b", "c", "d"]), ("a", ["b", "c", "d"])),
    ],
)
def test_the_table_of_decoded_texts(text, reference, fixed):
    for mode, (label, explanations) in (("reference", reference), ("fixed", fixed)):
        assert abstractive_explanations(text, mode=mode) == {"label": label, "explanations": explanations}


@MODES
@pytest.mark.parametrize("kind", [str, str.encode])
def test_o2_spans_over_characters_in_text_and_bytes(mode, kind):
    source = kind("explain sentiment review: it drags badly")
    result = read("negative explanation: drags badly", source, mode=mode, tokenizer=list)
    assert result["overlap_spans"] == [(29, 40)]
    assert len(result["span_array"]) == 40
    assert ones(result) == list(range(29, 40))


@pytest.mark.parametrize(("tokenizer", "shift"), [("spacy", 0), ("whitespace", 1)])
@MODES
def test_o3_duplicates_count_once(mode, tokenizer, shift):
    text = "negative explanation: the pace drags explanation: skip this one explanation: the pace drags"
    result = read(text, PACE, mode=mode, tokenizer=tokenizer)
    assert len(result["span_array"]) == 20 - shift
    assert result["overlap_spans"] == [(4 - shift, 7 - shift), (16 - shift, 19 - shift)]
    assert ones(result) == [position - shift for position in (4, 5, 6, 16, 17, 18)]
    assert result["explanations"] == ["the pace drags", "skip this one"]


@pytest.mark.parametrize(("tokenizer", "shift"), [("spacy", 0), ("whitespace", 1)])
@MODES
def test_o4_explanations_missing_from_the_source_are_dropped_and_counted(mode, tokenizer, shift):
    text = "negative explanation: a slow pace explanation: skip this one ."
    result = read(text, PACE, mode=mode, tokenizer=tokenizer)
    assert result["overlap_spans"] == [(16 - shift, 20 - shift)]
    assert result["explanations"] == ["skip this one ."]
    assert result.get("unmatched") == (1 if mode == "fixed" else None)


def test_o4_a_gold_rationale_that_is_not_in_the_source():
    text = "negative explanation: a slow pace explanation: skip this one ."
    with pytest.raises(ValueError, match="'a slow pace'"):
        read(text, PACE, mode="reference", is_target=True)
    assert read(text, PACE, mode="fixed", is_target=True)["gold_unmatched"] == 1
    with pytest.raises(ValueError, match="'a slow pace'"):
        read(text, PACE, mode="fixed", is_target=True, strict=True)


@MODES
def test_o5_a_separator_at_the_end(mode):
    result = read("negative explanation:", PACE, mode=mode)
    assert result["label"] == {"reference": "negative explanation:", "fixed": "negative"}[mode]
    assert result["explanations"] == []
    assert ones(result) == []


def test_o6_an_empty_explanation():
    reference = read("negative explanation: ", PACE, mode="reference")
    assert (reference["label"], reference["overlap_spans"], reference["explanations"]) == ("negative", [(0, 0)], [""])
    fixed = read("negative explanation: ", PACE, mode="fixed")
    assert (fixed["label"], fixed["overlap_spans"], fixed["explanations"]) == ("negative", [], [])


def test_o7_the_words_of_the_prompt_are_not_the_source():
    source = "explain sentiment review: quite a bold review of war"
    reference = read("positive explanation: review", source, mode="reference")
    assert reference["overlap_spans"] == [(2, 3)]
    assert len(reference["span_array"]) == 10
    own = "quite a bold review of war"
    fixed = read("positive explanation: review", source, mode="fixed", tokenizer="whitespace", own_source=own)
    assert fixed["overlap_spans"] == [(3, 4)]
    assert len(fixed["span_array"]) == 6


@pytest.mark.parametrize(("tokenizer", "spans"), [("spacy", [(4, 9)]), ("whitespace", [(3, 8)])])
@MODES
def test_o8_a_line_break_counts_as_a_space(mode, tokenizer, spans):
    source = "explain multirc passage: one day .\nthe cat left . query: who left ? answer: the cat"
    result = read("True explanation: one day . the cat", source, mode=mode, tokenizer=tokenizer)
    assert result["overlap_spans"] == spans


def test_o9_two_spaces_in_a_row():
    assert read("x explanation: one . two", "one . \ntwo .", mode="reference")["overlap_spans"] == []
    assert read("x explanation: one . two", "one . \ntwo .", mode="fixed")["overlap_spans"] == [(0, 3)]


def test_a_repeated_text_matches_outside_earlier_spans():
    result = read("x explanation: the pace drags explanation: drags", PACE, mode="fixed")
    assert result["overlap_spans"] == [(4, 7), (10, 11)]
    covered = read("x explanation: the end explanation: end", PACE, mode="fixed")
    assert covered["overlap_spans"] == [(13, 15)]
    assert covered["unmatched"] == 0


def test_characters_that_the_vocabulary_lacks_do_not_hide_a_span():
    result = read("x explanation: a set of pairs", "it is a { set } of <pairs .", mode="fixed", tokenizer="whitespace")
    assert result["overlap_spans"] == [(2, 8)]


def test_m9_class_numbers():
    classes = ["negative", "positive"]
    assert [string_label_to_class_id(text, classes) for text in ("positive", "Positive", "positive ")] == [1, -1, -1]


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="Found tokenizer 'letters'; expected one of: spacy, whitespace"):
        tokenizer_named("letters")
