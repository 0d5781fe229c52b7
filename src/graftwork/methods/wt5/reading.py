"""Reading of generated tokens: label index and positions in the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.core.example import Example
from graftwork.methods.wt5.grammar import Grammar
from graftwork.methods.wt5.parsing import abstractive_explanations
from graftwork.metrics.spans import Span
from graftwork.tasks.spans import collapsed, find_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_answer(
    tokenizer: PreTrainedTokenizerBase, grammar: Grammar, row: Example, ids: Sequence[int]
) -> Mapping[str, Any]:
    """Read an answer from its tokens.

    An answer in the language of the grammar is read without decoding it. Otherwise each part between separators is read
    on its own, and a part that is no copy of the source's tokens is searched as text.

    Args:
        tokenizer: Tokenizer of the model.
        grammar: Grammar of the example.
        row: The example.
        ids: Generated token ids; tokens from the first end of the text are ignored.

    Returns:
        `label` and `explanations`; for spans of a source also `spans`, in characters of the source, and `unmatched`,
        the number of explanations that are no span.
    """
    stop = next((place for place, token in enumerate(ids) if token in grammar.ends), len(ids))
    ids = list(ids[:stop])
    labels: Sequence[str] = row.metadata["choices"]
    source: str | None = row.metadata.get("source")
    if grammar.units is not None and source is not None and (path := grammar.read(ids)) is not None:
        return _located(labels[path.label], list(path.spans), 0, source)
    first, *parts = _split(ids, grammar.separator)
    parsed = abstractive_explanations(_text(tokenizer, ids))
    if not parts and parsed["explanations"]:
        # some vocabularies have tokens across the space after the separator
        return _searched(parsed, source)
    known = dict(zip(grammar.labels, labels, strict=True))
    label = known.get(tuple(first)) or _text(tokenizer, first)
    if source is None:
        reasons = [_text(tokenizer, part) for part in parts]
        return {"label": label, "explanations": [reason for reason in reasons if reason]}
    spans: list[Span] = []
    unmatched = 0
    for part in parts:
        if not part:
            continue
        span, there = grammar.read_span(part, spans), True
        if span is None:
            span, there = find_text(source, _text(tokenizer, part), spans)
        if span is not None:
            spans.append(span)
        unmatched += not there
    return _located(label, spans, unmatched, source)


def _searched(parsed: Mapping[str, Any], source: str | None) -> Mapping[str, Any]:
    """Answer whose explanations are searched as texts."""
    if source is None:
        return parsed
    spans: list[Span] = []
    unmatched = 0
    for reason in parsed["explanations"]:
        span, there = find_text(source, reason, spans)
        spans += [] if span is None else [span]
        unmatched += not there
    return _located(parsed["label"], spans, unmatched, source)


def _located(label: str, spans: Sequence[Span], unmatched: int, source: str) -> dict[str, Any]:
    # a repeated span is one explanation
    kept = list(dict.fromkeys(spans))
    texts = [collapsed(source[start:end]) for start, end in kept]
    return {"label": label, "explanations": texts, "spans": [list(span) for span in kept], "unmatched": unmatched}


def _split(ids: Sequence[int], separator: tuple[int, ...]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    place = 0
    while place < len(ids):
        if tuple(ids[place : place + len(separator)]) == separator:
            parts.append([])
            place += len(separator)
        else:
            parts[-1].append(ids[place])
            place += 1
    return parts


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    untyped: Any = tokenizer
    return str(untyped.decode(list(ids), skip_special_tokens=True)).strip()
