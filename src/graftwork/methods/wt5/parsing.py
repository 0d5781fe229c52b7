"""Parsing of generated text: a label and explanations, which are spans of the source in extractive tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from graftwork.errors import ConfigError, DataError, MissingExtraError
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.methods.wt5.orders import LABEL_MARK, AnswerOrder
from graftwork.metrics.spans import Span
from graftwork.tasks.eraser import document_tokens, token_places
from graftwork.tasks.spans import WORDS, find_text, token_array, token_spans, word_places

Mode = Literal["fixed", "reference"]
Tokenizer = Callable[[str], list[str]]

_MARK = re.compile(r"(?:(?<=\s)|^)explanation:(?=\s|$)")
_LABEL = re.compile(rf"(?:(?<=\s)|^){LABEL_MARK}(?=\s|$)")


def abstractive_explanations(
    text: str, *, mode: Mode = "fixed", order: AnswerOrder = "label_first", **ignored: Any
) -> dict[str, Any]:
    """Parse a label and explanations.

    Args:
        text: Generated text.
        mode: "reference" splits at the exact separator, so that a text truncated after it has a wrong label; "fixed"
            splits at the separator word between white space or text ends, strips the parts and drops empty
            explanations.
        order: Order of label and explanations. With reason_first, the label follows the last label mark; without one, a
            text with a separator has the empty label, and any other text is the label. With rationale, the label is
            empty.
        ignored: Further arguments of the extractive parser.

    Returns:
        `label` and `explanations`.

    Example:
        >>> abstractive_explanations("neutral explanation: it may rain")
        {'label': 'neutral', 'explanations': ['it may rain']}
    """
    if mode == "reference":
        label, *explanations = text.split(SEPARATOR)
        return {"label": label, "explanations": explanations}
    marks = list(_LABEL.finditer(text)) if order == "reason_first" else []
    if marks:
        # earlier marks belong to an explanation
        return {"label": text[marks[-1].end() :].strip(), "explanations": _pieces(text[: marks[-1].start()])}
    if order == "rationale" or (order == "reason_first" and _MARK.search(text)):
        return {"label": "", "explanations": _pieces(text)}
    label, *explanations = (piece.strip() for piece in _MARK.split(text))
    return {"label": label, "explanations": [piece for piece in explanations if piece]}


def _pieces(text: str) -> list[str]:
    return [piece.strip() for piece in _MARK.split(text) if piece.strip()]


def extractive_explanations(
    text: str,
    *,
    example: Mapping[str, Any],
    is_target: bool = False,
    tokenizer: str | Tokenizer = "spacy",
    mode: Mode = "fixed",
    order: AnswerOrder = "label_first",
    strict: bool = False,
) -> dict[str, Any]:
    """Parse a label and explanations, and find the explanations in the source.

    Args:
        text: Generated text.
        example: `inputs_pretokenized`, the input of the model as text or bytes; in fixed mode `source`, if present, is
            searched instead, so that prompt words never match.
        is_target: True for a gold target, whose explanations must all be found.
        tokenizer: "spacy", "whitespace" (ERASER's tokens), "words", or a function from text to tokens.
        mode: "reference" reproduces the authors' code.
        order: Order of label and explanations.
        strict: Raise for missing gold explanations in fixed mode too.

    Returns:
        `label`, `overlap_spans` of (start, end) tokens, `span_array` of 0 and 1, and the matched `explanations`; in
        fixed mode also `characters`, the spans as character offsets, `unmatched` and `gold_unmatched`.

    Raises:
        DataError: If a gold explanation is not found in reference mode or under `strict`.
    """
    source = example["inputs_pretokenized"] if mode == "reference" else example.get("source")
    source = example["inputs_pretokenized"] if source is None else source
    source = source.decode() if isinstance(source, bytes) else source
    if mode == "reference":
        return _as_the_authors(text, source, tokenizer_named(tokenizer), is_target)
    parsed = abstractive_explanations(text, order=order)
    spans: list[Span] = []
    kept: list[str] = []
    missing: list[str] = []
    for explanation in dict.fromkeys(parsed["explanations"]):
        place, there = find_text(source, explanation, spans)
        if place is not None:
            spans.append(place)
            kept.append(explanation)
        elif not there:
            missing.append(explanation)
    if missing and is_target and strict:
        raise _not_literal(missing[0])
    return {
        **span_fields(parsed["label"], spans, source, tokenizer),
        "explanations": kept,
        "unmatched": 0 if is_target else len(missing),
        "gold_unmatched": len(missing) if is_target else 0,
    }


def span_fields(label: str, spans: Sequence[Span], source: str, tokenizer: str | Tokenizer) -> dict[str, Any]:
    """Fields of an answer for the metrics: character spans, and token spans derived from them.

    Args:
        label: The label.
        spans: Character offsets into the source.
        source: The source.
        tokenizer: Tokens that the scores count.
    """
    places = places_of(source, tokenizer)
    return {
        "label": label,
        "characters": [tuple(span) for span in spans],
        "overlap_spans": token_spans(spans, places),
        "span_array": token_array(spans, places),
    }


def _as_the_authors(text: str, source: str, tokenize: Tokenizer, is_target: bool) -> dict[str, Any]:
    """Search of the words of each explanation among the words of the input, as in the authors' code."""
    parsed = abstractive_explanations(text, mode="reference")
    tokens = tokenize(source.replace("\n", " "))
    spans: list[Span] = []
    kept: list[str] = []
    for explanation in dict.fromkeys(parsed["explanations"]):
        words = tokenize(explanation)
        starts = range(len(tokens) - len(words) + 1)
        start = next((place for place in starts if tokens[place : place + len(words)] == words), None)
        if start is not None:
            spans.append((start, start + len(words)))
            kept.append(explanation)
        elif is_target:
            raise _not_literal(explanation)
    array = [0] * len(tokens)
    for start, end in spans:
        array[start:end] = [1] * (end - start)
    return {"label": parsed["label"], "overlap_spans": spans, "span_array": array, "explanations": kept}


def _not_literal(explanation: str) -> DataError:
    return DataError(
        f"Found the gold rationale {explanation!r}, which is not in the source; expected a literal span of it. "
        "Fix the data, or count such rationales with mode fixed."
    )


def string_label_to_class_id(text: str, classes: Sequence[str]) -> int:
    """Index of the class equal to the text, or −1."""
    return list(classes).index(text) if text in classes else -1


def tokenizer_named(tokenizer: str | Tokenizer) -> Tokenizer:
    """Look up a tokenizer by name; a function is returned unchanged.

    Raises:
        ConfigError: If the name is unknown.
    """
    if callable(tokenizer):
        return tokenizer
    known: dict[str, Tokenizer] = {"spacy": spacy_tokens, "whitespace": document_tokens, "words": WORDS.findall}
    if tokenizer not in known:
        raise ConfigError(f"Found tokenizer {tokenizer!r}; expected one of: {', '.join(known)}.")
    return known[tokenizer]


def places_of(text: str, tokenizer: str | Tokenizer) -> list[Span]:
    """Character range of each token of a text; tokens of white space are left out."""
    if tokenizer == "whitespace":
        return token_places(text)
    if tokenizer == "words":
        return word_places(text)
    found: list[Span] = []
    position = 0
    for token in tokenizer_named(tokenizer)(text):
        start = text.index(token, position)
        position = start + len(token)
        if callable(tokenizer) or not token.isspace():
            found.append((start, position))
    return found


@lru_cache(maxsize=512)
def _spacy_tokens(text: str) -> tuple[str, ...]:
    return tuple(token.text for token in _spacy()(text))


def spacy_tokens(text: str) -> list[str]:
    """Tokenize with spaCy's English rules; the blank pipeline equals the small model and needs no download.

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
