"""How generated text is read: a label, then reasons, which in extractive tasks have to be spans of the source."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from graftwork.errors import ConfigError, DataError, MissingExtraError
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.metrics.spans import Span
from graftwork.tasks.eraser import document_tokens

Mode = Literal["fixed", "reference"]
Tokenizer = Callable[[str], list[str]]

UNWRITABLE = str.maketrans("", "", "{}^\\`<~")
"""Characters that T5's vocabulary lacks: a span that holds one comes back without it."""

_MARK = re.compile(r"(?:(?<=\s)|^)explanation:(?=\s|$)")


def abstractive_explanations(text: str, *, mode: Mode = "fixed", **ignored: Any) -> dict[str, Any]:
    """Read a label and reasons.

    Args:
        text: What the model wrote.
        mode: "reference" splits at the exact separator, so that a text cut off behind it spoils the label; "fixed"
            takes the word wherever white space or an end is around it, strips the pieces and drops empty reasons.
        ignored: Further arguments that the extractive parser takes.

    Returns:
        `label` and `explanations`.

    Example:
        >>> abstractive_explanations("neutral explanation: it may rain")
        {'label': 'neutral', 'explanations': ['it may rain']}
    """
    if mode == "reference":
        label, *explanations = text.split(SEPARATOR)
        return {"label": label, "explanations": explanations}
    label, *explanations = (piece.strip() for piece in _MARK.split(text))
    return {"label": label, "explanations": [piece for piece in explanations if piece]}


def extractive_explanations(
    text: str,
    *,
    example: Mapping[str, Any],
    is_target: bool = False,
    tokenizer: str | Tokenizer = "spacy",
    mode: Mode = "fixed",
    strict: bool = False,
) -> dict[str, Any]:
    """Read a label and reasons, and find the reasons in the source.

    Args:
        text: What the model wrote.
        example: `inputs_pretokenized`, the model's input, as text or bytes; in fixed mode `source`, if it is there, is
            the text that is searched instead, so that no reason is found in the words of the prompt.
        is_target: The text is a gold target, whose reasons all have to be found.
        tokenizer: "spacy", "whitespace", or a function from text to tokens.
        mode: "reference" does what the authors' code does.
        strict: In fixed mode too, a gold reason that is not found is an error.

    Returns:
        `label`, `overlap_spans` of (start, end) tokens, `span_array` of 0 and 1, and the `explanations` found; in fixed
        mode also `unmatched` and `gold_unmatched`.

    Raises:
        DataError: If a gold reason is not found, in reference mode or under `strict`.
    """
    parsed = abstractive_explanations(text, mode=mode)
    tokenize = tokenizer_named(tokenizer)
    source = example["inputs_pretokenized"] if mode == "reference" else example.get("source")
    source = example["inputs_pretokenized"] if source is None else source
    source = source.decode() if isinstance(source, bytes) else source
    tokens = tokenize(source.replace("\n", " ") if mode == "reference" else _collapsed(source, tokenizer))
    find = _find_first if mode == "reference" else _find_uncovered
    spans: list[Span] = []
    kept: list[str] = []
    missing: list[str] = []
    for explanation in dict.fromkeys(parsed["explanations"]):
        words = tokenize(explanation if mode == "reference" else _collapsed(explanation, tokenizer))
        place, there = find(words, tokens, spans)
        if place is not None:
            spans.append(place)
            kept.append(explanation)
        elif not there:
            missing.append(explanation)
    if missing and is_target and (mode == "reference" or strict):
        raise DataError(
            f"Found the gold rationale {missing[0]!r}, which is not in the source; expected a literal span of it. "
            "Mend the data, or count such rationales with mode fixed."
        )
    array = [0] * len(tokens)
    for start, end in spans:
        array[start:end] = [1] * (end - start)
    result = {"label": parsed["label"], "overlap_spans": spans, "span_array": array, "explanations": kept}
    if mode == "reference":
        return result
    counts = {"unmatched": 0 if is_target else len(missing), "gold_unmatched": len(missing) if is_target else 0}
    return {**result, **counts}


def string_label_to_class_id(text: str, classes: Sequence[str]) -> int:
    """Index of exactly this text among the classes, −1 if it is none of them."""
    return list(classes).index(text) if text in classes else -1


def tokenizer_named(tokenizer: str | Tokenizer) -> Tokenizer:
    """The tokenizer that a word stands for; a function stands for itself.

    Raises:
        ConfigError: If there is none of that name.
    """
    if callable(tokenizer):
        return tokenizer
    known: dict[str, Tokenizer] = {"spacy": spacy_tokens, "whitespace": document_tokens}
    if tokenizer not in known:
        raise ConfigError(f"Found tokenizer {tokenizer!r}; expected one of: {', '.join(known)}.")
    return known[tokenizer]


@lru_cache(maxsize=512)
def _spacy_tokens(text: str) -> tuple[str, ...]:
    return tuple(token.text for token in _spacy()(text))


def spacy_tokens(text: str) -> list[str]:
    """Tokens of spaCy's English rules; the blank pipeline gives those of the small model, and needs no download.

    Raises:
        MissingExtraError: If spaCy is not installed.
    """
    return list(_spacy_tokens(text))


@lru_cache(maxsize=1)
def _spacy() -> Any:
    try:
        import spacy
    except ImportError:
        raise MissingExtraError("spacy", "wt5") from None
    return spacy.blank("en").tokenizer


def _collapsed(text: str, tokenizer: str | Tokenizer) -> str:
    # a function may count characters, which white space belongs to
    return text.replace("\n", " ") if callable(tokenizer) else " ".join(text.split())


def _find_first(words: Sequence[str], tokens: Sequence[str], taken: Sequence[Span]) -> tuple[Span | None, bool]:
    """The first place of the words, an empty one at 0 as in the authors' code."""
    for start in range(len(tokens) - len(words) + 1):
        if list(tokens[start : start + len(words)]) == list(words):
            return (start, start + len(words)), True
    return None, False


def _find_uncovered(words: Sequence[str], tokens: Sequence[str], taken: Sequence[Span]) -> tuple[Span | None, bool]:
    """The first place that no earlier span covers, and whether there is any place at all.

    Tokens are compared without the characters that the vocabulary lacks; one that has no others matches nothing itself.
    """
    wanted = [bare for bare in (word.translate(UNWRITABLE) for word in words) if bare]
    written = [(bare, place) for place, bare in enumerate(token.translate(UNWRITABLE) for token in tokens) if bare]
    there = False
    for first in range(len(written) - len(wanted) + 1) if wanted else ():
        if written[first][0] == wanted[0] and [bare for bare, _ in written[first : first + len(wanted)]] == wanted:
            span = written[first][1], written[first + len(wanted) - 1][1] + 1
            there = True
            if not any(start <= span[0] and span[1] <= end for start, end in taken):
                return span, True
    return None, there
