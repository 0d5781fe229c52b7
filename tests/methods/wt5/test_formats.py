"""Exact texts of formatted records: cases P1 to P14 of the specification, section 6."""

import pytest

from graftwork.errors import DataError
from graftwork.methods.wt5 import formats
from graftwork.methods.wt5.templates import Template
from graftwork.tasks import get_task
from graftwork.tasks.sources import Record

TYRE = {
    "question": "Where would you store a spare tyre?",
    "choices": ("boot", "kitchen", "library", "pond", "attic"),
    "answer": "boot",
    "abstractive_explanation": "cars carry the spare in the boot.",
}
CHOICES = "choice: boot choice: kitchen choice: library choice: pond choice: attic"
CHEF = {
    "premise": "A chef chops onions.",
    "hypothesis": "Someone is preparing food.",
    "label": 0,
    "explanation_1": "Chopping onions is food preparation.",
    "explanation_2": "",
    "explanation_3": "A chef is someone.",
}
REVIEW = {
    "review": "the script creaks .\nstill , the leads are charming .\n",
    "label": 1,
    "evidences": ("the leads are charming", "still"),
}
FERN = {
    "passage": "Mara watered the fern .\nIt grew tall .",
    "query_and_answer": "What grew ?  ||  The fern",
    "label": 1,
    "evidences": ("Mara watered the fern .", "It grew tall ."),
}


def test_p1_cos_e():
    assert formats.cos_e(TYRE) == (
        f"explain cos_e question: Where would you store a spare tyre? {CHOICES}",
        "boot explanation: cars carry the spare in the boot.",
    )


def test_p2_cos_e_as_an_entailment_pair():
    worded = formats.cos_e(TYRE, prefix="nli", question_prefix="premise:", drop_explanations=True)
    assert worded == (f"nli premise: Where would you store a spare tyre? {CHOICES}", "boot")


def test_the_word_before_a_choice_can_be_changed():
    worded = formats.cos_e({**TYRE, "choices": ("a", "b")}, prefix="explain nli", choice_prefix="hypothesis:")
    assert worded.inputs == "explain nli question: Where would you store a spare tyre? hypothesis: a hypothesis: b"


def test_p3_esnli_leaves_out_an_empty_explanation_and_keeps_the_order():
    assert formats.esnli(CHEF) == (
        "explain nli hypothesis: Someone is preparing food. premise: A chef chops onions.",
        "entailment explanation: Chopping onions is food preparation. explanation: A chef is someone.",
    )


def test_p4_esnli_with_choices_and_the_label_alone():
    fields = {"premise": "A chef chops onions.", "hypothesis": "The chef is asleep.", "label": 2, "explanation_1": "x"}
    assert formats.esnli(fields, prefix="nli", drop_explanations=True, add_choices=True) == (
        "nli hypothesis: The chef is asleep. premise: A chef chops onions. "
        "choice: entailment choice: neutral choice: contradiction",
        "contradiction",
    )


@pytest.mark.parametrize("explanations", [{}, dict.fromkeys(("explanation_1", "explanation_2", "explanation_3"), "")])
def test_p5_without_explanations_there_is_no_separator(explanations):
    fields = {"premise": "A chef chops onions.", "hypothesis": "The soup is for a wedding.", "label": 1, **explanations}
    assert formats.esnli(fields) == (
        "explain nli hypothesis: The soup is for a wedding. premise: A chef chops onions.",
        "neutral",
    )


def test_p6_movies_in_the_order_of_the_file():
    assert formats.extractive_explanations(REVIEW, rationale_order="file") == (
        "explain sentiment review: the script creaks .\nstill , the leads are charming .\n",
        "positive explanation: the leads are charming explanation: still",
    )
    for order in ("file", "text"):
        assert formats.extractive_explanations({**REVIEW, "evidences": ()}, rationale_order=order).targets == "positive"


def test_spans_are_learned_in_reading_order_merged_and_once():
    fields = {**REVIEW, "evidences": ("leads are charming", "still", "the leads are", "still")}
    assert (
        formats.extractive_explanations(fields).targets
        == "positive explanation: still explanation: the leads are charming"
    )


def test_p7_movies_with_the_label_alone():
    assert formats.extractive_explanations(REVIEW, prefix="sentiment", drop_explanations=True) == (
        "sentiment review: the script creaks .\nstill , the leads are charming .\n",
        "positive",
    )
    kept = formats.extractive_explanations(REVIEW, drop_explanations=True)
    assert kept.inputs.startswith("explain sentiment review: ")
    assert kept.targets == "positive"


def test_p8_multirc():
    worded = formats.eraser_multi_rc(FERN)
    assert type(worded.inputs) is str
    assert worded == (
        "explain multirc passage: Mara watered the fern .\nIt grew tall . query: What grew ? answer: The fern",
        "True explanation: Mara watered the fern . explanation: It grew tall .",
    )
    assert formats.eraser_multi_rc(FERN, drop_explanations=True).targets == "True"
    assert formats.split_query("Who || what left ? || Ann") == ("Who", "what left ?")
    with pytest.raises(ValueError, match="query_and_answer 'What grew'"):
        formats.eraser_multi_rc({**FERN, "query_and_answer": "What grew"})


def test_p9_imdb():
    assert formats.imdb_reviews({"text": "Loved it.", "label": 1}) == ("sentiment: Loved it.", "positive")
    assert formats.imdb_reviews({"text": "No idea.", "label": -1}) == ("sentiment: No idea.", "<unk>")
    assert formats.imdb_reviews({"text": "Fine.", "label": 0}, style="review").inputs == "sentiment review: Fine."


def test_p10_amazon():
    mug = {"review_headline": "Decent mug", "review_body": "Keeps tea warm.", "star_rating": 3}
    assert formats.amazon_reviews(mug) is None
    assert formats.amazon_reviews(mug, binary_output=False) == ("sentiment review: Decent mug Keeps tea warm.", "3")
    assert formats.amazon_reviews({**mug, "star_rating": 4}, prefix="explain sentiment") == (
        "explain sentiment review: Decent mug Keeps tea warm.",
        "positive",
    )
    assert formats.amazon_reviews({**mug, "star_rating": 2}).targets == "negative"
    assert formats.amazon_reviews({**mug, "star_rating": 5}, binary_output=False).targets == "5"


def test_p13_the_rest_of_the_movies_is_asked_for_reasons_in_reference_mode_only():
    task = get_task("movie_rationales_labels_skip1000_v010")
    fixed = task.format(Record("a", REVIEW))
    reference = task.in_mode("reference").format(Record("a", REVIEW))
    assert fixed.input.startswith("sentiment review:")
    assert reference.input.startswith("explain sentiment review:")
    assert fixed.target == reference.target == "positive"


@pytest.mark.parametrize("mode", ["fixed", "reference"])
def test_p14_a_pair_without_label(mode):
    task = get_task("mnli_explain_eval_matched_v002").in_mode(mode)
    example = task.format(Record("a", {"premise": "P.", "hypothesis": "H.", "label": -1}))
    assert (example.input, example.target) == ("explain nli hypothesis: H. premise: P.", "<unk>")
    assert not example.metadata["labelled"]


def test_the_task_of_movies_keeps_the_order_of_the_file_in_reference_mode_only():
    task = get_task("movie_rationales_eval_v010")
    record = Record("a", {**REVIEW, "groups": ()})
    assert task.in_mode("reference").format(record).target.endswith("charming explanation: still")


def test_multirc_reads_all_groups_where_the_reference_reads_the_first(tmp_path):
    from graftwork.tasks.eraser import Evidence

    groups = ((Evidence("It grew tall .", 5, 9),), (Evidence("Mara watered the fern .", 0, 5),))
    record = Record("a", {**FERN, "groups": groups})
    task = get_task("eraser_multi_rc_eval_v011")
    assert task.format(record).target == "True explanation: Mara watered the fern . explanation: It grew tall ."
    assert task.in_mode("reference").format(record).target == "True explanation: It grew tall ."


def test_an_example_stores_the_position_of_its_source():
    example = get_task("eraser_multi_rc_eval_v011").format(Record("a", {**FERN, "passage": "passage: x ."}))
    start = example.metadata["source_start"]
    assert example.input[start:].startswith("passage: x . query:")
    assert example.metadata["source"] == "passage: x ."
    amazon = get_task("amazon_reviews_books_v1_00_eval_v010").format(
        Record("0", {"review_headline": "Good", "review_body": "Read it.", "star_rating": 5})
    )
    assert amazon.metadata["source"] == "Good Read it."


def test_a_snippet_without_tokens_is_counted_and_not_learned():
    from graftwork.tasks.eraser import Evidence

    fields = {"groups": ((Evidence("", 0, 0), Evidence("still", 4, 5), Evidence("nowhere")),)}
    gold = formats.gold_rationales(REVIEW["review"], fields)
    assert (gold.spans, gold.texts, gold.empty, gold.unmatched) == (((20, 25),), ("still",), 1, 1)


def test_a_broken_query_names_its_field():
    with pytest.raises(DataError, match="expected a question and an answer separated by"):
        Template(formats.eraser_multi_rc, {}, ("False", "True"), "passage")(
            Record("a", {**FERN, "query_and_answer": "no bars"})
        )
