"""Labels, BLEU and spans: the cases M1 to M9 and section 2.9 of the specification, and two libraries as oracles."""

import random
import subprocess
import sys

import numpy as np
import pytest

from graftwork.errors import DataError
from graftwork.metrics.classification import accuracy, f1a
from graftwork.metrics.spans import (
    chance_token_f1,
    extractive_explanations_metric,
    iou_scores,
    merge_spans,
    ranking_scores,
    token_scores,
)
from graftwork.metrics.text import bleu, bleu_signature, esnli_metric

pytest.importorskip("sacrebleu", reason="BLEU needs the extra wt5")
pytest.importorskip("sklearn", reason="the oracle of these tests needs the extra wt5")

MODES = pytest.mark.parametrize("mode", ["fixed", "reference"])


def entry(label, *explanations):
    return {"label": label, "explanations": list(explanations)}


@MODES
def test_m1_one_reference_each(mode):
    targets = [
        entry("neutral", "the chef may cook for many reasons"),
        entry("entailment", "chopping onions is preparing food"),
    ]
    predictions = [
        entry("neutral", "the chef may cook for many people"),
        entry("contradiction", "chopping onions is preparing food"),
    ]
    result = esnli_metric(targets, predictions, mode=mode)
    assert result["accuracy"] == 50.0
    assert result["bleu"] == pytest.approx(88.06841674939027, rel=1e-6)
    assert result["expln1_length"] == 33


@pytest.mark.parametrize(("mode", "score"), [("reference", 100.0), ("fixed", 50.0)])
def test_m2_misplaced_second_references(mode, score):
    targets = [entry("neutral", "red blue green gold"), entry("neutral", "one two three four", "up down left right")]
    predictions = [entry("neutral", "up down left right")] * 2
    result = esnli_metric(targets, predictions, mode=mode)
    assert result["accuracy"] == 100
    assert result["bleu"] == pytest.approx(score, rel=1e-6)


@MODES
def test_m3_spans_and_tokens(mode):
    def array(length, *spans):
        return [int(any(start <= position < end for start, end in spans)) for position in range(length)]

    gold, found = [(3, 6), (14, 17)], [(3, 6), (7, 9)]
    target = {"label": "x", "overlap_spans": gold, "span_array": array(18, *gold)}
    prediction = {"label": "x", "overlap_spans": found, "span_array": array(18, *found), "explanations": ["a", "b"]}
    result = extractive_explanations_metric([target], [prediction], mode=mode)
    assert result["accuracy"] == 100
    assert result["f1"] == pytest.approx(50.0)
    assert result["partial match f1"] == pytest.approx(54.5454545)
    assert result["avg_explanation_count"] == 2.0


@pytest.mark.parametrize("length", [3, 0])
def test_m4_nothing_marked_and_nothing_found(length):
    nothing = {"label": "x", "overlap_spans": [], "span_array": [0] * length}
    reference = extractive_explanations_metric([nothing], [nothing], mode="reference")
    assert (reference["f1"], reference["partial match f1"]) == (0, 0)
    fixed = extractive_explanations_metric([nothing], [nothing])
    assert (fixed["f1"], fixed["partial match f1"], fixed["n_without_gold"]) == (None, None, 1)


@MODES
def test_m4_a_gold_span_on_an_empty_array(mode):
    gold = {"label": "x", "overlap_spans": [(0, 2)], "span_array": []}
    nothing = {"label": "x", "overlap_spans": [], "span_array": []}
    result = extractive_explanations_metric([gold], [nothing], mode=mode)
    assert (result["f1"], result["partial match f1"]) == (0.0, 0.0)


def test_m5_f1_over_all_answers():
    assert f1a(
        ["True", "False", "True", "True", "False"], ["True", "False", "False", "maybe", "True"]
    ) == pytest.approx(40.0)
    assert f1a(["False"], ["False"]) == 0.0


def test_m6_eraser_scores():
    gold = [{(2, 5), (7, 8)}, {(0, 3)}]
    predicted = [{(2, 4)}, {(1, 3), (5, 6)}]
    scores = iou_scores(gold, predicted)
    assert scores["micro"] == pytest.approx(dict.fromkeys(("precision", "recall", "f1"), 2 / 3))
    assert scores["macro"] == pytest.approx(dict.fromkeys(("precision", "recall", "f1"), 0.75))
    assert token_scores(gold, predicted)["macro"]["f1"] == pytest.approx(0.6666667)


def test_m8_bleu_tokenises_punctuation_and_is_case_sensitive():
    assert bleu(["it costs $5, really"], ["it costs $5 , really"]) == pytest.approx(100)
    score = bleu(["Cats sleep all day long ."], ["cats sleep all day long ."])
    assert score == pytest.approx(75.98356855516925, rel=1e-6)


def test_the_signature_of_bleu():
    assert "case:mixed" in bleu_signature()
    assert "tok:intl" in bleu_signature()
    assert "smooth:exp" in bleu_signature("var")


def test_cases_of_the_authors_tests():
    assert esnli_metric([entry("a", "x y z w")], [entry("a", "x y z w")])["bleu"] == pytest.approx(100)
    pairs = [entry("a", "one two three four"), entry("a", "")]
    assert esnli_metric(pairs, pairs)["bleu"] == pytest.approx(100)
    two = [entry("a", "", "one two three four")]
    for mode in ("fixed", "reference"):
        result = esnli_metric(two, [entry("a", "one two three four", "more", "and more")], mode=mode)
        assert result["bleu"] == pytest.approx(100)
    assert esnli_metric(two, [entry("a", "sixteen letters.")])["expln1_length"] == 16


def test_an_empty_reference_next_to_another_one_is_missing():
    with_empty = esnli_metric([entry("a", "", "one two three four")], [entry("a", "one two three five")])["bleu"]
    assert with_empty == esnli_metric([entry("a", "one two three four")], [entry("a", "one two three five")])["bleu"]


def test_arguments_are_not_changed_and_unknown_keys_refused():
    predictions = [entry("a", "x", "y")]
    esnli_metric([entry("a", "x")], predictions, mode="reference")
    assert predictions == [entry("a", "x", "y")]
    with pytest.raises(DataError, match="Found the key 'span'"):
        esnli_metric([{**entry("a"), "span": 1}], [entry("a")])
    with pytest.raises(DataError, match="Found the key 'span'"):
        extractive_explanations_metric(
            [{"label": "a", "overlap_spans": [], "span_array": [], "span": 1}],
            [{"label": "a", "overlap_spans": [], "span_array": []}],
        )


def test_bleu_is_none_without_reference_explanations():
    result = esnli_metric([entry("a"), entry("b")], [entry("a", "because"), entry("a")])
    assert result["bleu"] is None
    assert result["explanation_rate"] == 50
    assert result["avg_explanation_length"] == 3.5


def test_bleu_of_right_labels_alone():
    targets = [entry("a", "one two three four"), entry("b", "five six seven eight")]
    predictions = [entry("a", "one two three four"), entry("a", "nine ten")]
    result = esnli_metric(targets, predictions)
    assert result["bleu_correct_only"] == pytest.approx(100)
    assert result["bleu"] < 100


def test_the_extractive_case_of_the_authors():
    one = {"label": "1", "overlap_spans": [(0, 2)], "span_array": [1, 1, 0], "explanations": ["a", "b", "c"]}
    gold = [{**one, "label": "0"}, {**one, "overlap_spans": [(0, 1)], "span_array": [1, 0, 0]}]
    found = [one, {**one, "overlap_spans": [(2, 3)], "span_array": [0, 0, 1], "explanations": ["a", "b"]}]
    for mode in ("fixed", "reference"):
        result = extractive_explanations_metric(gold, found, mode=mode)
        assert [result[name] for name in ("accuracy", "f1", "partial match f1")] == [50, 50, 50]
        assert result["avg_explanation_count"] == 2.5
    gold = [{"label": "1", "overlap_spans": [(2, 4)], "span_array": [0, 0, 1, 1]}]
    found = [{"label": "1", "overlap_spans": [], "span_array": [1, 0, 0, 1]}]
    result = extractive_explanations_metric(gold, found, mode="reference")
    assert (result["f1"], result["partial match f1"]) == (0, 50)


def test_chance_level_is_the_mean_over_all_placements_of_spans_of_the_gold_lengths():
    def target(length, *spans):
        array = [int(any(start <= place < end for start, end in spans)) for place in range(length)]
        return {"label": "x", "overlap_spans": list(spans), "span_array": array}

    # two of four tokens: the three places share 2, 1 and 0 tokens with the gold span
    assert chance_token_f1([target(4, (0, 2))], draws=4000) == pytest.approx(100 * (1 + 0.5 + 0) / 3, abs=1.5)
    # one token of ten
    assert chance_token_f1([target(10, (3, 4))], draws=4000) == pytest.approx(10, abs=1.5)
    assert chance_token_f1([target(3, (0, 3))]) == 100
    assert chance_token_f1([]) is None
    assert chance_token_f1([target(9, (1, 3), (5, 8))]) == chance_token_f1([target(9, (1, 3), (5, 8))])


def test_adjacent_spans_are_kept_separate():
    assert merge_spans([(0, 5), (5, 9), (8, 10), (0, 5)]) == ((0, 5), (5, 10))


def test_bleu_agrees_with_sacrebleu_called_directly_on_a_thousand_cases():
    import sacrebleu

    random.seed(0)
    words = ["a", "b", "c", "d", ",", ".", "red", "blue", "$5", "it's"]

    def sentence():
        return " ".join(random.choices(words, k=random.randint(1, 9)))

    for _ in range(1000):
        size = random.randint(1, 4)
        predictions = [sentence() for _ in range(size)]
        references = [[sentence() for _ in range(size)] for _ in range(random.randint(1, 2))]
        expected = sacrebleu.corpus_bleu(
            predictions,
            references,
            smooth_method="exp",
            force=False,
            lowercase=False,
            tokenize="intl",
            use_effective_order=False,
        ).score
        assert bleu(predictions, *references) == expected


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_token_f1_agrees_with_scikit_learn_on_a_thousand_cases():
    from sklearn.metrics import f1_score, precision_score, recall_score

    generator = np.random.default_rng(0)
    pairs = [
        (generator.integers(0, 2, length), generator.integers(0, 2, length) * generator.integers(0, 2, length))
        for length in generator.integers(1, 12, 1000)
    ]
    gold = [{"label": "x", "overlap_spans": [], "span_array": list(truth)} for truth, _ in pairs]
    found = [{"label": "x", "overlap_spans": [], "span_array": list(said)} for _, said in pairs]
    expected = 100 * np.mean([f1_score(truth, said, zero_division=0) for truth, said in pairs])
    assert extractive_explanations_metric(gold, found, mode="reference")["partial match f1"] == pytest.approx(expected)
    marked = [(truth, said) for truth, said in pairs if truth.any()]
    fixed = extractive_explanations_metric(gold, found)
    assert fixed["n_without_gold"] == 1000 - len(marked) > 0
    for name, score in (("token_f1", f1_score), ("token_precision", precision_score), ("token_recall", recall_score)):
        expected = 100 * np.mean([score(truth, said, zero_division=0) for truth, said in marked])
        assert fixed[name] == pytest.approx(expected), name


def test_ranking_scores_are_those_of_eraser():
    # by hand: the ranking is 1 0 1, so precision at recall 1/2 is 1 and at recall 1 is 2/3
    scores = ranking_scores([[1, 0, 1]], [[0.9, 0.5, 0.1]])
    assert scores["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert scores["roc_auc"] == pytest.approx(0.5)
    assert scores["auprc"] == pytest.approx(0.5 * 1 + 0.5 * (0.5 + 2 / 3) / 2)
    assert ranking_scores([[0, 0]], [[0.9, 0.5]])["auprc"] is None


def test_labels():
    assert accuracy(["a", "b"], ["a", "c"]) == 50
    with pytest.raises(DataError, match="Found 1 labels for 2 targets"):
        accuracy(["a", "b"], ["a"])


def test_importing_the_metrics_loads_neither_library():
    heavy = "{'sacrebleu', 'sklearn', 'torch', 'spacy'}"
    code = f"import sys, graftwork.metrics.text, graftwork.metrics.spans; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
