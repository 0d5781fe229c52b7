import pytest

from graftwork.core.example import Example, Examples
from graftwork.errors import DataError
from graftwork.metrics.text import (
    DROP_F1,
    EXACT_MATCH,
    F1,
    ROUGE_L,
    SQUAD2_EXACT_MATCH,
    SQUAD2_F1,
    choose_option,
    drop_f1,
    exact_match,
    f1,
    multiple_choice,
    normalize_answer,
    option_similarity,
    squad2_f1,
)
from graftwork.tasks.unifiedqa import MULTIPLE_CHOICE_ACCURACY


def examples(*answers: tuple[str, ...], size: int | None = None, same_input: bool = False) -> Examples:
    rows = tuple(
        Example(str(i), "q" if same_input else f"q{i}", row[0] if row else "", row) for i, row in enumerate(answers)
    )
    return Examples("toy", "dev", rows, len(rows) if size is None else size, 0, "")


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "word_f1"),
    [
        ("the", "The", 1, 0),
        ("A", "a", 1, 0),
        ("", "", 1, 0),
        ("No Answer>", "<No Answer>", 1, 1),
        ("16,000 rpm", "16000 RPM", 1, 1),
        ("re-do", "redo", 1, 1),
        ("x x y", "x y y", 0, 2 / 3),
        ("“word”", "word", 0, 0),
        ("a dog barks", "The dog!", 0, 2 / 3),
        ("cat", "dog", 0, 0),
        ("", "dog", 0, 0),
    ],
)
def test_scores_of_pairs_are_those_of_squad(prediction, answer, exact, word_f1):
    assert exact_match(prediction, answer) == exact
    assert f1(prediction, answer) == pytest.approx(word_f1)
    assert f1(answer, prediction) == pytest.approx(word_f1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog\tand\nAN ox.", "cat dog and ox"),
        ("theatre another", "theatre another"),
        ("a-b", "ab"),
        ("l'an “the” – x", "lan “ ” – x"),
        (" \u00a0É ", "é"),
    ],
)
def test_normalisation_is_that_of_squad(text, expected):
    assert normalize_answer(text) == expected


def test_each_metric_takes_the_best_answer_of_a_row():
    rows = examples(("x y z", "x"), ("no", "yes"))
    assert EXACT_MATCH.compute(["x y", "yes"], rows) == 50.0
    assert F1.compute(["x y", "yes"], rows) == pytest.approx(100 * (0.8 + 1) / 2)


def test_rows_that_could_not_be_parsed_count_as_wrong():
    assert EXACT_MATCH.compute(["x", "y"], examples(("x",), ("y",), size=8)) == 25.0


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError, match="Found no example to score"):
        F1.compute([], examples())
    for metric in (EXACT_MATCH, F1, SQUAD2_F1, ROUGE_L, DROP_F1):
        with pytest.raises(DataError, match="Found no answer for example 0"):
            metric.compute(["x"], examples(()))


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("no answer>", ("<No Answer>",), (100.0, 100.0)),
        ("there is No Answer here", ("<No Answer>",), (100.0, 100.0)),
        ("", ("<No Answer>",), (100.0, 100.0)),
        ("Paris", ("<No Answer>",), (0.0, 0.0)),
        ("Paris", ("Paris", "no answer"), (0.0, 0.0)),
        ("no answer", ("Paris",), (0.0, 0.0)),
        ("in Paris", ("Paris", "London"), (0.0, 200 / 3)),
        ("the", ("a",), (100.0, 100.0)),
    ],
)
def test_squad2_reads_no_answer_as_the_empty_text(prediction, answers, expected):
    rows = examples(answers)
    found = (SQUAD2_EXACT_MATCH.compute([prediction], rows), SQUAD2_F1.compute([prediction], rows))
    assert found == pytest.approx(expected)


def test_squad2_differs_from_squad_only_for_empty_texts():
    assert (f1("the", "a"), squad2_f1("the", "a")) == (0.0, 1.0)
    assert squad2_f1("the", "dog") == 0.0
    assert squad2_f1("x x y", "x y y") == f1("x x y", "x y y")


@pytest.mark.parametrize(
    ("option", "prediction", "expected"),
    [
        ("solar energy", "solar energy", 3),
        ("the sun's heat", 'the suns "heat"', 2),
        ("h{2}o", "h\u20472\u2047o", 2),
        ("a<b", "a b", 2),
        ("fast food", "food", 1 / 2),
        ("a b c d", "d x a", 2 / 4),
        ("x x y", "x y", 2 / 3),
        ("cat", "cats", 0),
        ("", "cat", 0),
    ],
)
def test_options_are_compared_in_three_steps(option, prediction, expected):
    assert option_similarity(option, prediction) == pytest.approx(expected)


def test_the_first_of_equal_options_is_chosen():
    assert choose_option(["red fox", "grey fox"], "a fox") == 0
    assert choose_option(["red fox", "grey fox"], "grey fox") == 1
    assert choose_option(["red", "grey"], "blue") == 0
    with pytest.raises(DataError, match="Found no options to choose from"):
        choose_option([], "blue")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"answer_key": "B"}, 100.0),
        ({"answer_key": "2"}, 100.0),
        ({"answer_key": "b"}, 100.0),
        ({}, 100.0),
        ({"answer_key": "A"}, 0.0),
        ({"answer_key": "1"}, 0.0),
    ],
)
def test_the_chosen_letter_is_compared_with_the_right_one(metadata, expected):
    row = Example("0", r"Which? \n (A) Red fox (B) Grey wolf", "Grey wolf", ("Grey wolf",), metadata)
    rows = Examples("toy", "dev", (row,), 1, 0, "")
    assert MULTIPLE_CHOICE_ACCURACY.compute(["the Grey wolf "], rows) == expected
    two = Examples("toy", "dev", (row,), 2, 1, "")
    assert multiple_choice(lambda row: ("red fox", "grey wolf"))(["grey wolf"], two) == expected / 2


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("5 yards", ["5 yards"], 1.0),
        ("6 yards", ["5 yards"], 0.0),
        ("5.0 yards", ["5 yards"], 1.0),
        ("1e3", ["1000"], 1.0),
        ("the 5-yard line", ["5 yard"], 0.8),
        ("yards", ["5 yards"], 0.0),
        ("5 yards", ["yards"], 0.67),
        ("x x y", ["x y y"], 1.0),
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("more", ["more", "less"], 0.5),
        ("a b c", ["b", "b c", "d"], 0.33),
    ],
)
def test_drop_requires_the_number_and_every_span(prediction, answers, expected):
    assert drop_f1(prediction, answers) == pytest.approx(expected)


def test_drop_groups_the_rows_of_one_question_as_spans_of_one_answer():
    rows = examples(("north",), ("south",), same_input=True)
    assert DROP_F1.compute(["north", "north"], rows) == 50.0
    assert DROP_F1.compute(["north", "north"], examples(("north",), ("south",))) == 50.0
    assert DROP_F1.compute(["north", "south"], rows) == 50.0


def test_rouge_counts_a_question_once_with_its_best_answer():
    rows = examples(("he runs away",), ("the dogs barked loudly",), same_input=True)
    # stemming makes dog/dogs and barks/barked equal: 3 common of 3 and of 4
    assert ROUGE_L.compute(["the dog barks", "ignored"], rows) == pytest.approx(100 * 2 * 0.75 / 1.75)
    two = examples(("he runs away", "the dog barks"), ("something else",))
    assert ROUGE_L.compute(["the dog barks", "nothing"], two) == 50.0
