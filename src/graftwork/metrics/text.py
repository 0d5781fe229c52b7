"""Scores of generated text against the answers that count as right."""

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
    """Reduce a text to what SQuAD compares: lower case, no ASCII punctuation, no articles, single spaces.

    Source: Rajpurkar et al. 2016, the evaluation script of SQuAD 1.1.

    Example:
        >>> normalize_answer("The  16,000 RPM!")
        '16000 rpm'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both texts are equal once normalised, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the multiset of normalised words.

    Source: the evaluation script of SQuAD 1.1, which gives two texts without any word 0 here although they match
    exactly; published numbers contain that.
    """
    return _word_f1(normalize_answer(prediction).split(), normalize_answer(answer).split())


def squad2_f1(prediction: str, answer: str) -> float:
    """As `f1`, but two texts without any word agree.

    Source: Rajpurkar et al. 2018, the evaluation script of SQuAD 2.0.
    """
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    return _word_f1(predicted, expected) if predicted and expected else float(predicted == expected)


def drop_f1(prediction: str, answers: Sequence[str]) -> float:
    """Bag-of-words F1 of one text against all spans of an answer, where a number has to be right.

    The one predicted span is aligned with the gold span that it fits best, and the spans left over count 0.

    Source: Dua et al. 2019, evaluation of DROP, as `allenai/unifiedqa` uses it for DROP, Quoref and ROPES; words form
    sets there, not multisets, and the score of a row is rounded to two decimals.
    """
    predicted = _drop_words(prediction)
    best = max(_drop_pair(predicted, _drop_words(answer)) for answer in answers)
    return round(best / len(answers), 2)


def option_similarity(option: str, prediction: str) -> float:
    """How well a generated text fits an answer option, for choosing the nearest one.

    Source: `allenai/unifiedqa`, `evaluate_multiple_choice_answers.py`: 3 if equal; 2 if equal without quotes and with
    the characters that T5 cannot write as spaces; else the share of common words if either has several; else 0.
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
    """Index of the option that is most similar to a generated text, the first one among equals.

    Raises:
        DataError: If there is no option.
    """
    if not options:
        raise DataError("Found no options to choose from; expected some such as '(A) … (B) …' in the input.")
    scores = [option_similarity(option, prediction) for option in options]
    return scores.index(max(scores))


def bleu(predictions: Sequence[str], *references: Sequence[str | None]) -> float:
    """Corpus BLEU in 0…100, case-sensitive, by the international tokenizer; `bleu_signature` names the configuration.

    Source: Post 2018, `sacrebleu`, with the settings of the `t5` library.

    Args:
        predictions: Generated texts.
        references: One or more streams of references; None where an example has none in that stream.
    """
    logger = logging.getLogger("sacrebleu")
    level = logger.level
    # data sets whose texts are tokenised already would be complained of at every evaluation
    logger.setLevel(logging.ERROR)
    try:
        return float(_bleu().corpus_score(list(predictions), [list(stream) for stream in references]).score)
    finally:
        logger.setLevel(level)


def bleu_signature(references: int | str = 1) -> str:
    """The configuration of `bleu`, as sacrebleu writes it."""
    metric = _bleu()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature()).replace("nrefs:1", f"nrefs:{references}", 1)


def _bleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "wt5") from None
    # `t5` passes the smoothing value 0.0, which exponential smoothing does not use and sacrebleu refuses to print
    return BLEU(smooth_method="exp", tokenize="intl", lowercase=False, force=False, effective_order=False)


def esnli_metric(
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    *,
    mode: Literal["fixed", "reference"] = "fixed",
) -> dict[str, float | None]:
    """Labels and BLEU of the first generated reason against the first two references.

    Source: Narang et al. 2020.

    Differs from the authors' code in fixed mode: second references stay with their examples, arguments are not changed,
    and more numbers are returned.

    Args:
        targets: `label` and `explanations` of each example.
        predictions: The same.
        mode: "reference" computes and returns what the authors' code does, its misplaced second references included.

    Returns:
        `bleu` is None in fixed mode if no target has a reason.

    Raises:
        DataError: If the lists do not pair up or an entry holds another key.
    """
    if unknown := sorted({key for entry in (*targets, *predictions) for key in entry} - {"label", "explanations"}):
        raise DataError(f"Found the key {unknown[0]!r}; expected only label and explanations.")
    right = accuracy([entry["label"] for entry in targets], [entry["label"] for entry in predictions])
    texts = [next(iter(entry["explanations"]), "") for entry in predictions]
    result: dict[str, float | None] = {"accuracy": right, "expln1_length": float(len(texts[0]))}
    if mode == "reference":
        first = [next(iter(entry["explanations"]), "") for entry in targets]
        second = [entry["explanations"][1] for entry in targets if len(entry["explanations"]) > 1]
        # the streams are cut to the shorter one, which is what sacrebleu does with them
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
    """Make a metric of a score for pairs: 100 × the sum over rows of the best over answers, by the examples' size.

    Rows that could not be read are part of the size and so count as wrong, as in the published tables.
    """

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        pairs = zip(predictions, examples.rows, strict=True)
        total = sum(max(score(text, answer) for answer in _answers(row)) for text, row in pairs)
        return _percent(total, examples.size)

    return compute


def multiple_choice(
    options: Callable[[Example], Sequence[str]],
) -> Callable[[Sequence[str], Examples], float]:
    """Make a metric that chooses the option nearest to the generated text and compares it with the right one.

    Source: `allenai/unifiedqa`, `evaluate_multiple_choice_answers.py`.

    Differs from it: the generated text is lower-cased like the options, a digit is taken for a letter (1 = A), and
    where no letter is known, the right option is the one nearest to the answer.

    Args:
        options: Reads the options, in lower case, off an example.
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
    """A metric in which every wording of "no answer" is the empty text, and the only right one once it is right."""

    def compute(predictions: Sequence[str], examples: Examples) -> float:
        total = 0.0
        for text, row in zip(predictions, examples.rows, strict=True):
            answers = _answers(row)
            answers = ("",) if any(_says_no_answer(answer) for answer in answers) else answers
            total += max(score("" if _says_no_answer(text) else text, answer) for answer in answers)
        return _percent(total, examples.size)

    return compute


def _rouge_l(predictions: Sequence[str], examples: Examples) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    groups = _by_input(predictions, examples, lambda row: row.answers)
    total = sum(scorer.score_multi(answers, text)["rougeL"].fmeasure for text, answers in groups)
    return _percent(total, len(groups))


def _drop(predictions: Sequence[str], examples: Examples) -> float:
    groups = _by_input(predictions, examples, lambda row: (row.target,))
    return _percent(sum(drop_f1(text, answers) for text, answers in groups), len(groups))


def _by_input(
    predictions: Sequence[str], examples: Examples, answers: Callable[[Example], tuple[str, ...]]
) -> list[tuple[str, list[str]]]:
    """(first prediction, answers of all its rows) for every different input: some sets give an answer a row."""
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


def _says_no_answer(text: str) -> bool:
    return "no answer" in text.lower()


def _gold_index(row: Example, options: Sequence[str]) -> int:
    key = str(row.metadata.get("answer_key", "")).upper()
    if key:
        return int(key) - 1 if key.isdecimal() else ord(key) - ord("A")
    return choose_option(options, _answers(row)[0].strip().lower())


def _drop_words(text: str) -> set[str]:
    """The different words of a text; a hyphen parts words, a number keeps its point and is compared by value."""
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
