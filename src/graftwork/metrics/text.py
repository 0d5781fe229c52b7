"""Metrics of generated text against accepted answers."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from graftwork.errors import DataError, MissingExtraError
from graftwork.metrics.classification import accuracy
from graftwork.metrics.metric import Metric

if TYPE_CHECKING:
    from graftwork.core.example import Example, Examples

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_QUOTES = str.maketrans("", "", "\"'")
_UNWRITABLE = str.maketrans(dict.fromkeys("{}^\\`\u2047<", " "))


def normalize_answer(text: str) -> str:
    """Normalise a text as SQuAD does: lower case, no ASCII punctuation, no articles, single spaces.

    Source: Rajpurkar et al. 2016, the evaluation script of SQuAD 1.1.

    Example:
        >>> normalize_answer("The  16,000 RPM!")
        '16000 rpm'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the normalised texts are equal, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """F1 = 2·P·R / (P + R) over the multisets of normalised words.

    Source: the evaluation script of SQuAD 1.1. Two empty texts have F1 0 although they match exactly, as in the
    published numbers.
    """
    return _word_f1(normalize_answer(prediction).split(), normalize_answer(answer).split())


def squad2_f1(prediction: str, answer: str) -> float:
    """Like `f1`, but two empty texts have F1 1.

    Source: Rajpurkar et al. 2018, the evaluation script of SQuAD 2.0.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    return _word_f1(predicted, expected) if predicted and expected else float(predicted == expected)


def drop_f1(prediction: str, answers: Sequence[str]) -> float:
    """Bag-of-words F1 of DROP against all gold spans of an answer; 0 if no number of a gold span is predicted.

    The predicted span is aligned with its best gold span; the other gold spans count 0, so the score is
    max_i F1(prediction, answer_i) / number of answers.

    Source: Dua et al. 2019, evaluation of DROP, in the version of `allenai/unifiedqa` for DROP, Quoref and ROPES:
    words form sets, not multisets, and the score of a row is rounded to two decimals.
    """
    predicted = _drop_words(prediction)
    best = max(_drop_pair(predicted, _drop_words(answer)) for answer in answers)
    return round(best / len(answers), 2)


def option_similarity(option: str, prediction: str) -> float:
    """Similarity of a generated text and an answer option, for choosing the closest option.

    Source: `allenai/unifiedqa`, `evaluate_multiple_choice_answers.py`: 3 if equal; 2 if equal after removing quotes and
    replacing characters outside T5's vocabulary by spaces; else the share of common words if either has several words;
    else 0.
    """
    if option == prediction:
        return 3.0
    option, prediction = (text.translate(_QUOTES).translate(_UNWRITABLE) for text in (option, prediction))
    if option == prediction:
        return 2.0
    if " " not in option and " " not in prediction:
        return 0.0
    words, others = option.split(" "), prediction.split(" ")
    return len(set(words) & set(others)) / max(len(words), len(others))


def choose_option(options: Sequence[str], prediction: str) -> int:
    """Index of the option most similar to a generated text; the first of equals.

    Raises:
        DataError: If `options` is empty.
    """
    if not options:
        raise DataError("Found no options to choose from; expected some such as '(A) … (B) …' in the input.")
    scores = [option_similarity(option, prediction) for option in options]
    return scores.index(max(scores))


def bleu(predictions: Sequence[str], *references: Sequence[str | None]) -> float:
    """Corpus BLEU in [0, 100], case-sensitive, with the international tokenizer; see `bleu_signature`.

    Source: Post 2018, `sacrebleu`, with the settings of the `t5` library.

    Args:
        predictions: Generated texts.
        references: One or more reference streams; None for an example without a reference in that stream.
    """
    logger = logging.getLogger("sacrebleu")
    level = logger.level
    # sacrebleu would warn about tokenised data sets at every evaluation
    logger.setLevel(logging.ERROR)
    try:
        return float(_bleu().corpus_score(list(predictions), [list(stream) for stream in references]).score)
    finally:
        logger.setLevel(level)


def bleu_signature(references: int | str = 1) -> str:
    """Sacrebleu signature of `bleu`."""
    metric = _bleu()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature()).replace("nrefs:1", f"nrefs:{references}", 1)


def _bleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "wt5") from None
    # `t5` passes smooth_value 0.0, which exponential smoothing ignores and sacrebleu cannot format
    return BLEU(smooth_method="exp", tokenize="intl", lowercase=False, force=False, effective_order=False)


def esnli_metric(
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    *,
    mode: Literal["fixed", "reference"] = "fixed",
) -> dict[str, float | None]:
    """Label accuracy, and BLEU of the first generated explanation against the first two references.

    Source: Narang et al. 2020.

    Differs from the authors' code in fixed mode: second references stay aligned with their examples, arguments are not
    modified, and more numbers are returned.

    Args:
        targets: `label` and `explanations` of each example.
        predictions: The same keys.
        mode: "reference" reproduces the values and keys of the authors' code, including misaligned second references.

    Returns:
        Metric name → value; `bleu` is None in fixed mode if no target has an explanation.

    Raises:
        DataError: If the lists have different lengths or an entry holds an unknown key.
    """
    if unknown := sorted({key for entry in (*targets, *predictions) for key in entry} - {"label", "explanations"}):
        raise DataError(f"Found the key {unknown[0]!r}; expected only label and explanations.")
    right = accuracy([entry["label"] for entry in targets], [entry["label"] for entry in predictions])
    texts = [next(iter(entry["explanations"]), "") for entry in predictions]
    result: dict[str, float | None] = {"accuracy": right, "expln1_length": float(len(texts[0]))}
    if mode == "reference":
        first = [next(iter(entry["explanations"]), "") for entry in targets]
        second = [entry["explanations"][1] for entry in targets if len(entry["explanations"]) > 1]
        # sacrebleu truncates the streams to the shortest one
        return {**result, "bleu": bleu(texts, first, second) if second else bleu(texts, first)}
    chosen = [
        text
        for text, target, entry in zip(texts, targets, predictions, strict=True)
        if target["label"] == entry["label"]
    ]
    correct = [target for target, entry in zip(targets, predictions, strict=True) if target["label"] == entry["label"]]
    return {
        **result,
        "bleu": _aligned_bleu(texts, targets),
        "bleu_correct_only": _aligned_bleu(chosen, correct),
        "avg_explanation_length": sum(map(len, texts)) / len(texts),
        "explanation_rate": 100 * sum(any(entry["explanations"]) for entry in predictions) / len(predictions),
        "n": len(targets),
    }


def _aligned_bleu(texts: Sequence[str], targets: Sequence[Mapping[str, Any]]) -> float | None:
    references = [[text for text in entry["explanations"][:2] if text] or [""] for entry in targets]
    if not any(text for row in references for text in row):
        return None
    first = [row[0] for row in references]
    second = [row[1] if len(row) > 1 else None for row in references]
    return bleu(texts, first, second) if any(second) else bleu(texts, first)


def mean_best(
    score: Callable[[str, str], float],
) -> Callable[[Sequence[str], Examples], float]:
    """Create a metric from a pairwise score: 100/size · Σ_rows max_answers score(prediction, answer).

    Rows that could not be parsed are included in the size and count as wrong, as in the published tables.
    """

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        pairs = zip(predictions, examples.rows, strict=True)
        total = sum(max(score(text, answer) for answer in _answers(row)) for text, row in pairs)
        return _percent(total, examples.size)

    return compute


def multiple_choice(
    options: Callable[[Example], Sequence[str]],
) -> Callable[[Sequence[str], Examples], float]:
    """Create a metric that compares the option most similar to the generated text with the correct option.

    Source: `allenai/unifiedqa`, `evaluate_multiple_choice_answers.py`.

    Differs from it: the generated text is lower-cased like the options, digits are accepted as answer keys (1 = A), and
    without an answer key the correct option is the one most similar to the answer.

    Args:
        options: Returns the lower-case options of an example.
    """

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        right = 0
        for text, row in zip(predictions, examples.rows, strict=True):
            choices = options(row)
            gold = _gold_index(row, choices)
            right += choose_option(choices, text.strip().lower()) == gold
        return _percent(right, examples.size)

    return compute


def _squad2(score: Callable[[str, str], float]) -> Callable[[Sequence[str], Examples], float]:
    """Create a SQuAD 2.0 metric: "no answer" counts as the empty text, the only right prediction of such a row."""

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        total = 0.0
        for text, row in zip(predictions, examples.rows, strict=True):
            answers = _answers(row)
            answers = ("",) if any(_is_no_answer(answer) for answer in answers) else answers
            total += max(score("" if _is_no_answer(text) else text, answer) for answer in answers)
        return _percent(total, examples.size)

    return compute


def _rouge_l(predictions: Sequence[str], examples: Examples) -> float:
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingTypeStubs]

    scorer: Any = RougeScorer(["rougeL"], use_stemmer=True)
    groups = _by_input(predictions, examples, lambda row: row.answers)
    total = sum(scorer.score_multi(answers, text)["rougeL"].fmeasure for text, answers in groups)
    return _percent(total, len(groups))


def _drop(predictions: Sequence[str], examples: Examples) -> float:
    groups = _by_input(predictions, examples, lambda row: (row.target,))
    return _percent(sum(drop_f1(text, answers) for text, answers in groups), len(groups))


def _by_input(
    predictions: Sequence[str], examples: Examples, answers: Callable[[Example], tuple[str, ...]]
) -> list[tuple[str, list[str]]]:
    """Group rows by input, as (first prediction, answers of all its rows): some data sets have one row per answer."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for text, row in zip(predictions, examples.rows, strict=True):
        _answers(row)
        groups.setdefault(row.input, (text, []))[1].extend(answers(row))
    return list(groups.values())


def _answers(row: Example) -> tuple[str, ...]:
    if not row.answers:
        raise DataError(f"Found no answer for example {row.key}; expected one to score against. Use predict instead.")
    return row.answers


def _percent(total: float, size: int) -> float:
    if size < 1:
        raise DataError("Found no example to score; expected at least one.")
    return 100.0 * total / size


def _word_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _is_no_answer(text: str) -> bool:
    return "no answer" in text.lower()


def _gold_index(row: Example, options: Sequence[str]) -> int:
    key = str(row.metadata.get("answer_key", "")).upper()
    if key:
        return int(key) - 1 if key.isdecimal() else ord(key) - ord("A")
    return choose_option(options, _answers(row)[0].strip().lower())


def _drop_words(text: str) -> set[str]:
    """Set of words of a text; hyphens separate words, numbers keep their decimal point and are compared by value."""
    words: set[str] = set()
    for token in re.split("[ -]", text.lower()):
        bare = token if _is_number(token) else token.translate(_PUNCTUATION)
        words.update(_ARTICLES.sub(" ", str(float(bare)) if _is_number(bare) else bare).split())
    return words


def _drop_pair(predicted: set[str], expected: set[str]) -> float:
    numbers = {word for word in expected if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    common = len(predicted & expected)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(expected) if expected else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


EXACT_MATCH = Metric("exact_match", mean_best(exact_match), description="SQuAD 1.1 exact match, best over answers")
F1 = Metric("f1", mean_best(f1), description="SQuAD 1.1 word F1, best over answers")
SQUAD2_EXACT_MATCH = Metric("exact_match", _squad2(exact_match), description="SQuAD 2.0 exact match")
SQUAD2_F1 = Metric("f1", _squad2(squad2_f1), description="SQuAD 2.0 word F1")
ROUGE_L = Metric("rouge_l", _rouge_l, description="ROUGE-L F, best over the answers of rows with equal inputs")
DROP_F1 = Metric("drop_f1", _drop, description="DROP F1 over the answers of rows with equal inputs")
