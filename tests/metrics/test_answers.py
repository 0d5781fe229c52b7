"""Scores of short answers; expected numbers are the specification's or computed by hand."""

import random
import re
import string

import pytest

from graftwork.errors import DataError
from graftwork.metrics.answers import (
    bootstrap_interval,
    macro_average,
    normalize_short_answer,
    paired_bootstrap,
    score_answer,
    score_group,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("A", "a"),
        ("A.", "a"),
        ("The Cat", "cat"),
        ("an apple", "apple"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("a the", ""),
        ("“Ä”", "“ä”"),
    ],
)
def test_answers_are_normalised(text, normalised):
    assert normalize_short_answer(text) == normalised


def literal_score(prediction: str, gold: str) -> tuple[float, float]:
    """Exact match and F1 as the specification of the original states them, step by step."""

    def normalized(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        if text != "a":
            text = re.sub(r"\b(a|an|the)\b", " ", text)
        return " ".join(text.split())

    left, right = normalized(prediction), normalized(gold)
    match = float(left == right)
    if left != right and {left, right} & {"yes", "no", "noanswer"}:
        return match, 0.0
    pool, same = right.split(), 0
    for word in left.split():
        if word in pool:
            pool.remove(word)
            same += 1
    if not same:
        return match, 0.0
    precision, recall = same / len(left.split()), same / len(right.split())
    return match, 2 * precision * recall / (precision + recall)


def test_scores_of_random_pairs_equal_the_stated_steps():
    draw = random.Random(0)
    words = ["a", "A.", "an", "the", "yes", "No", "noanswer", "cat", "dog", "U.S.A.", "1,000", ".", " ", "“Ä”", "a-b"]
    for _ in range(10_000):
        one, other = (" ".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(2))
        found = score_answer(one, [other])
        assert (found.exact_match, found.f1) == literal_score(one, other), (one, other)


def test_yes_and_no_match_exactly_or_not():
    assert score_answer("yes it is", ["yes"]).f1 == 0
    assert score_answer("no", ["no way"]).f1 == 0
    assert score_answer("Yes.", ["yes"]).f1 == 1


def test_words_count_with_their_multiplicity():
    score = score_answer("the the cat cat", ["cat cat dog"])
    assert (score.f1, score.precision, score.recall) == (pytest.approx(0.8), 1.0, pytest.approx(2 / 3))


def test_two_empty_texts_match_exactly_without_any_word_in_common():
    score = score_answer("", [""])
    assert (score.exact_match, score.f1) == (1.0, 0.0)


def test_the_best_of_several_golds_counts():
    score = score_answer("new york city", ["Boston", "New York", "york"])
    # "New York": precision 2/3, recall 1
    assert (score.exact_match, score.f1) == (0.0, pytest.approx(0.8))
    with pytest.raises(DataError, match="no gold answer"):
        score_answer("x", [])


def test_a_missing_prediction_is_wrong_by_default():
    gold = {"0": ["cat"], "1": ["dog"], "2": ["cow"]}
    group = score_group({"0": "cat", "2": "a horse"}, gold)
    assert (group.exact_match, group.f1, group.size, group.missing) == (33.33, 33.33, 3, 1)
    assert group.f1_interval[0] <= group.f1 <= group.f1_interval[1]
    assert score_group({"0": "cat", "2": "a horse"}, gold, missing_is_wrong=False).exact_match == 50.0
    with pytest.raises(DataError, match="unknown questions, such as '7'"):
        score_group({"7": "x"}, gold)
    other = score_group({"0": "cat"}, {"0": ["cat"]})
    assert macro_average({"a": group, "b": other})["f1"] == pytest.approx(66.66, abs=0.011)


def test_bootstrap_intervals_have_their_nominal_coverage():
    import random

    draw = random.Random(0)
    inside = 0
    for seed in range(100):
        low, high = bootstrap_interval([float(draw.random() < 0.3) for _ in range(60)], seed=seed)
        inside += low <= 0.3 <= high
    assert inside >= 88  # 95 of 100 expected; below 88 has a chance of 0.4 %


def test_the_paired_bootstrap_detects_differences_within_overlapping_intervals():
    hard = [float(index % 2) for index in range(100)]
    better = [min(1.0, score + (index % 10 == 0)) for index, score in enumerate(hard)]
    outcome = paired_bootstrap(better, hard)
    assert outcome["difference"] == pytest.approx(0.1)
    assert 0 < outcome["low"] < 0.1 < outcome["high"]
    assert outcome["p_value"] < 0.01
    assert paired_bootstrap(hard, hard)["p_value"] == 1.0
    with pytest.raises(DataError, match="2 and 1"):
        paired_bootstrap([1, 2], [1])


def test_the_paired_bootstrap_of_another_aggregate_than_the_mean():
    ours, theirs = [float(index % 3) for index in range(40)], [float(index % 2) for index in range(40)]
    means = paired_bootstrap(ours, theirs, aggregate=lambda values: sum(values) / len(values))
    assert means == pytest.approx(paired_bootstrap(ours, theirs))
    # quotients of sums, as of perplexities: that of every sample is 2 for one system and 3 for the other
    pairs = [(float(index), 1.0 + index % 4) for index in range(10)]
    doubled = [(2 * words, words) for _, words in pairs]
    tripled = [(3 * words, words) for _, words in pairs]
    outcome = paired_bootstrap(
        tripled, doubled, aggregate=lambda rows: sum(row[0] for row in rows) / sum(row[1] for row in rows)
    )
    assert outcome == {"difference": 1.0, "low": 1.0, "high": 1.0, "p_value": 0.0}
