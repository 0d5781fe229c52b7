"""Rows with a text, a label and an explanation: free text, or spans as quotes, character offsets or token masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from graftwork.core.readers import shorten
from graftwork.errors import DataError
from graftwork.metrics.spans import Span, merge_spans
from graftwork.settings.fields import DataFields
from graftwork.tasks.own_data.formats import Parts, RowFormat
from graftwork.tasks.own_data.teacher import COLUMN, keep_right, outputs_of
from graftwork.tasks.own_data.values import as_object, chosen, field, listed, options, text, texts
from graftwork.tasks.sources import written
from graftwork.tasks.spans import find_text


def explained(fields: DataFields) -> RowFormat:
    """Return the format of rows with a text, a label, and explanations in free text or as spans of the text.

    Args:
        fields: Mapping with `text_field`, and `explanation_field` or `spans_field`.
    """
    source_name, label_name = str(fields.text_field), str(fields.label_field)

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        source, places = _source(field(row, source_name, where, "text_field"), source_name, where)
        label = None
        pairs = [] if fields.choices_field is None else _choices(row, fields.choices_field, where)
        if required or row.get(label_name) not in (None, ""):
            value = field(row, label_name, where, "label_field")
            if pairs:
                value = chosen(value, pairs, label_name, where)
            label = text(value, label_name, where, numbers=True).strip()
            if not label:
                raise DataError(
                    f"{where}: found an empty field {label_name!r}; expected a label. Fix or remove the row."
                )
            if fields.labels and label not in fields.labels:
                raise DataError(
                    f"{where}: found the label {shorten(label)} in {label_name!r}; expected one of: "
                    f"{', '.join(fields.labels)}. Fix the row, or the labels."
                )
        spans: tuple[Span, ...] = ()
        unmatched = 0
        reasons: list[str] = []
        if fields.spans_field is not None and (label is not None or fields.spans_field in row):
            value = field(row, fields.spans_field, where, "spans_field")
            spans, unmatched = _spans(value, source, places, fields.spans_field, where)
        for name in fields.explanations_of:
            if label is not None or name in row:
                value = field(row, name, where, "explanation_field")
                reasons += [one for one in map(written, [] if value is None else texts(value, name, where)) if one]
        choices = tuple(option.strip() for _, option in pairs)
        kept = None
        if teacher is not None and label is not None and required:
            outputs, places_of = outputs_of(field(row, teacher, where, "teacher_field"), teacher, where)
            kept = keep_right(outputs, label, choices, places_of)
            reasons += kept.reasons
        return Parts(
            source,
            label,
            () if label is None else (label,),
            choices=choices,
            explanations=tuple(reasons),
            spans=spans,
            unmatched=unmatched,
            kept=kept,
        )

    teacher = COLUMN if fields.teacher_outputs else fields.teacher_field
    more = [fields.choices_field, label_name, *fields.explanations_of, fields.spans_field, teacher]
    columns = [source_name, *filter(None, more)]
    return RowFormat("explained", f"{columns[0]} → {listed(columns[1:], 100)}", read, "explained")


def _choices(row: Mapping[str, Any], name: str, where: str) -> list[tuple[str, str]]:
    found = options(field(row, name, where, "choices_field"), name, where)
    repeated = [option for _, option in found if [other for _, other in found].count(option) > 1]
    if repeated:
        raise DataError(f"{where}: found the option {shorten(repeated[0])} twice in {name!r}; expected distinct ones.")
    return found


def _source(value: Any, name: str, where: str) -> tuple[str, list[Span]]:
    """Text of a row and the character range of each of its tokens; a list of tokens is joined by spaces."""
    if not isinstance(value, list):
        source = text(value, name, where)
        if not source.strip():
            raise DataError(f"{where}: found an empty field {name!r}; expected a text. Fix or remove the row.")
        places: list[Span] = []
        end = 0
        for word in source.split():
            start = source.index(word, end)
            end = start + len(word)
            places.append((start, end))
        return source, places
    tokens = texts(cast("Any", value), name, where)
    places, start = [], 0
    for token in tokens:
        places.append((start, start + len(token)))
        start += len(token) + 1
    return " ".join(tokens), places


def _spans(value: Any, source: str, places: Sequence[Span], name: str, where: str) -> tuple[tuple[Span, ...], int]:
    """Character spans of a row, and the number of quotes that are not in its text."""
    value = _parsed(value, name, where)
    items: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    items = [item for item in items if item is not None and not (isinstance(item, str) and not written(item))]
    if not items:
        return (), 0
    if all(isinstance(item, str) for item in items):
        return _quoted(cast("list[str]", items), source)
    masks = _masks(items, len(places))
    if masks is not None:
        return marked_spans(masks, places), 0
    offsets = [_offsets(item, source, name, where) for item in items]
    return merge_spans(offsets), 0


def _parsed(value: Any, name: str, where: str) -> Any:
    """Value of a cell: JSON if it begins with a bracket, else itself."""
    if not (isinstance(value, str) and value.lstrip()[:1] == "["):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        # a quote can begin with a bracket
        return value
    if not isinstance(found, list):
        raise DataError(f"{where}: found {shorten(value)} as field {name!r}; expected a list. Fix the row.")
    return cast("list[Any]", found)


def _quoted(quotes: Sequence[str], source: str) -> tuple[tuple[Span, ...], int]:
    found: list[Span] = []
    missing = 0
    for quote in quotes:
        span, there = find_text(source, quote, found)
        if span is not None:
            found.append(span)
        missing += not there
    return merge_spans(found), missing


def _masks(items: Sequence[Any], count: int) -> list[list[int]] | None:
    """Token masks of the annotators: one list of 0 and 1, or a list of such lists; None for other values."""
    lists = [items] if all(_is_mark(item) for item in items) else items
    ok = all(
        isinstance(own, list) and len(cast("list[Any]", own)) == count and all(map(_is_mark, cast("list[Any]", own)))
        for own in lists
    )
    return [list(map(int, own)) for own in lists] if ok else None


def _is_mark(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)


def marked_spans(masks: Sequence[Sequence[int]], places: Sequence[Span]) -> tuple[Span, ...]:
    """Spans of the tokens that at least half of the annotators have marked.

    Args:
        masks: 0 or 1 for each token, one list of each annotator.
        places: Character range of each token.
    """
    spans: list[Span] = []
    before = False
    for place, votes in zip(places, zip(*masks, strict=True), strict=True):
        own = 2 * sum(votes) >= len(votes)
        if own and before:
            spans[-1] = (spans[-1][0], place[1])
        elif own:
            spans.append(place)
        before = own
    return tuple(spans)


def _offsets(item: Any, source: str, name: str, where: str) -> Span:
    """One span given as [start, end] or as an object with `start` and `end`."""
    holder = as_object(item)
    pair: Any = [holder.get("start"), holder.get("end")] if holder else item
    numbers = cast("list[Any]", pair) if isinstance(pair, list) else []
    good = len(numbers) == 2 and all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
    if not good or not 0 <= numbers[0] < numbers[1] <= len(source):
        raise DataError(
            f"{where}: found {shorten(item)} in field {name!r}; expected a quote of the text, [start, end] in "
            f"characters of the text, which has {len(source)}, or one 0 or 1 for each token. Fix the row."
        )
    return int(numbers[0]), int(numbers[1])
