"""Sample answers beside those of the reference."""

from __future__ import annotations

from graftwork.metrics.results import Sample
from graftwork.reporting.samples import Answer, differing, sample_rows


def test_answers_are_grouped_beside_those_of_the_dense_model():
    given = {"k=8": "the dog", "dense": "a cat", "k=64": " A Cat", "k=4": "the dog", "k=768": "a cat", "k=2": ""}
    (row,) = sample_rows([Sample("t", "which?", ("a cat", "cat"), given)])
    assert row.reference == Answer(((False, "a cat"),), right=True, names=("dense",))
    assert row.same == ("k=768",)
    assert row.others == (
        Answer(((True, "the dog"),), right=False, names=("k=8", "k=4")),
        Answer(((True, "A Cat"),), right=True, names=("k=64",)),
        Answer((), right=False, names=("k=2",)),
    )


def test_the_first_setting_is_the_reference_without_a_dense_one():
    rows = sample_rows([Sample("t", "x", ("b",), {"one": "a", "two": "b"}), Sample("t", "y", ("b",), {})])
    assert [(row.reference.names, [other.names for other in row.others]) for row in rows] == [(("one",), [("two",)])]


def test_only_words_that_the_reference_lacks_are_marked():
    assert differing("in the big town", "in a big town") == ((False, "in"), (True, "the"), (False, "big town"))
    assert differing("same words", "same words") == ((False, "same words"),)
    assert differing("", "x") == ()
    assert differing("x x x", "x") == ((False, "x"), (True, "x x"))
