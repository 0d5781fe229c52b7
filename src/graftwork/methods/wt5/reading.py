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
        return _located(labels[path.label] if path.label >= 0 else "", list(path.spans), 0, source)
    parsed = abstractive_explanations(_text(tokenizer, ids), order=grammar.order)
    named, rest = _divided(ids, grammar)
    parts = grammar.reasons(rest)
    known = dict(zip(grammar.labels, labels, strict=True))
    whole = named is not None and (any(parts) or tuple(named) in known or grammar.order == "rationale")
    if named is None or not (whole or not parsed["explanations"]):
        # some vocabularies have tokens across the space after a separator or a mark
        return _searched(parsed, source)
    label = known.get(tuple(named)) or _text(tokenizer, named)
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


def _divided(ids: Sequence[int], grammar: Grammar) -> tuple[Sequence[int] | None, Sequence[int]]:
    """Token ids of the label, None if it is not found, and the answer that its explanations are read from."""
    if grammar.order == "rationale":
        return (), ids
    if grammar.order == "label_first":
        size = len(grammar.separator)
        stops = (place for place in range(len(ids)) if tuple(ids[place : place + size]) == grammar.separator)
        return ids[: next(stops, len(ids))], ids
    later, first = grammar.marks
    places = [place for place in range(len(ids)) if tuple(ids[place : place + len(later)]) == later]
    opened: list[tuple[Sequence[int], Sequence[int]]] = []
    if tuple(ids[: len(first)]) == first:
        opened.append((ids[len(first) :], ()))
    found = [*opened, *((ids[place + len(later) :], ids[:place]) for place in places)]
    # a label can contain the mark, and so can an explanation
    whole = (one for one in found if tuple(one[0]) in grammar.labels)
    return next(whole, found[-1] if found else (None, ids))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    untyped: Any = tokenizer
    return str(untyped.decode(list(ids), skip_special_tokens=True)).strip()
