"""Parsing of generated text: a label and explanations, which are spans of the source in extractive tasks."""

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
"""Characters missing from T5's vocabulary; they are absent from generated spans."""

_MARK = re.compile(r"(?:(?<=\s)|^)explanation:(?=\s|$)")


def abstractive_explanations(text: str, *, mode: Mode = "fixed", **ignored: Any) -> dict[str, Any]:
    """Parse a label and explanations.

    Args:
        text: Generated text.
        mode: "reference" splits at the exact separator, so that a text truncated after it has a wrong label; "fixed"
            splits at the separator word between white space or text ends, strips the parts and drops empty
            explanations.
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
    """Parse a label and explanations, and find the explanations in the source.

    Args:
        text: Generated text.
        example: `inputs_pretokenized`, the input of the model as text or bytes; in fixed mode `source`, if present, is
            searched instead, so that prompt words never match.
        is_target: True for a gold target, whose explanations must all be found.
        tokenizer: "spacy", "whitespace", or a function from text to tokens.
        mode: "reference" reproduces the authors' code.
        strict: Raise for missing gold explanations in fixed mode too.

    Returns:
        `label`, `overlap_spans` of (start, end) tokens, `span_array` of 0 and 1, and the matched `explanations`; in
        fixed mode also `unmatched` and `gold_unmatched`.

    Raises:
        DataError: If a gold explanation is not found in reference mode or under `strict`.
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
            "Fix the data, or count such rationales with mode fixed."
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
    """Index of the class equal to the text, or −1."""
    return list(classes).index(text) if text in classes else -1


def tokenizer_named(tokenizer: str | Tokenizer) -> Tokenizer:
    """Look up a tokenizer by name; a function is returned unchanged.

    Raises:
        ConfigError: If the name is unknown.
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


def _collapsed(text: str, tokenizer: str | Tokenizer) -> str:
    # white space is kept for functions, which may count characters
    return text.replace("\n", " ") if callable(tokenizer) else " ".join(text.split())


def _find_first(words: Sequence[str], tokens: Sequence[str], taken: Sequence[Span]) -> tuple[Span | None, bool]:
    """First match of the words, and True if there is one; no words match at 0, as in the authors' code."""
    for start in range(len(tokens) - len(words) + 1):
        if list(tokens[start : start + len(words)]) == list(words):
            return (start, start + len(words)), True
    return None, False


def _find_uncovered(words: Sequence[str], tokens: Sequence[str], taken: Sequence[Span]) -> tuple[Span | None, bool]:
    """First match outside the earlier spans, and True if there is a match anywhere.

    Characters missing from the vocabulary are ignored; tokens made of such characters only are skipped.
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
