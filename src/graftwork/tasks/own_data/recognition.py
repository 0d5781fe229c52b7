"""Recognition of the format of rows by their columns and values; an ambiguous data set is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftwork.errors import DataError
from graftwork.settings.fields import DataFields
from graftwork.tasks.own_data.formats import FINAL, RowFormat, alpaca, chat, gsm8k, mapped, prompt_completion, squad
from graftwork.tasks.own_data.values import listed

LABEL = "label"
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
)
"""Column names of a pair of texts, in their order."""
IDENTIFIERS = frozenset(("id", "idx", "index", "guid", "uid", "key", "row_id", "split", "source", "dataset"))
"""Columns that are never inputs or answers."""
SAMPLE = 20
"""Number of rows that the format is recognised from."""


def recognise(rows: Sequence[Mapping[str, Any]], where: str, kind: str) -> RowFormat:
    """Return the format of the first rows of a data set.

    Args:
        rows: First rows, at least one.
        where: Name of the data, for errors.
        kind: File format, for errors.

    Raises:
        DataError: If no format, or more than one, fits the columns; the message names what to pass.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    found = _candidates(rows, columns)
    shown = listed(columns)
    if len(found) == 1:
        return found[0]
    if found:
        names = "; ".join(f"{one.name} ({one.uses})" for one in found)
        raise DataError(
            f"{where}: found {kind} with the columns {shown}, which fit several formats: {names}. Expected one; name "
            "the columns with --input-field and --target-field, --label-field, or --messages-field."
        )
    raise DataError(
        f"{where}: found {kind} with the columns {shown}; expected a known format (messages, Alpaca, SQuAD, GSM8K, "
        "question and answer, prompt and completion, input and target, or 'label' beside one text column)"
        f"{_hint(columns)}. Name the "
        "columns with --input-field (or --input-template) and --target-field or --label-field."
    )


def _candidates(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[RowFormat]:
    names = set(columns)
    found: list[RowFormat] = [
        chat(column, system=True)
        for column in ("messages", "conversations")
        if column in names and _is_chat(rows, column)
    ]
    if "instruction" in names:
        outputs = [name for name in ("output", "response") if name in names]
        contexts = [name for name in ("input", "context") if name in names]
        if len(contexts) < 2 and (outputs or len(names - IDENTIFIERS) <= 2):
            found += [alpaca(contexts[0] if contexts else "input", output) for output in outputs or ["output"]]
    elif "input" in names:
        found += _pairs(names, "input", ("target", "ans", "output"), "input and target")
    if "prompt" in names and ("completion" in names or len(names - IDENTIFIERS) == 1):
        found.append(prompt_completion())
    if "question" in names:
        found += _questions(rows, names)
    if LABEL in names:
        found += _classes(columns, bool(found))
    return found


def _pairs(names: set[str], source: str, targets: Sequence[str], name: str) -> list[RowFormat]:
    """Formats of one input column with each target column that exists; without any, for prediction only."""
    present = [target for target in targets if target in names]
    if not present and names - IDENTIFIERS - {source}:
        return []
    more = ("all_answers",) if "all_answers" in names else ()
    return [mapped(DataFields(input_field=source, target_field=(one, *more)), name) for one in present] or [
        mapped(DataFields(input_field=source), name)
    ]


def _questions(rows: Sequence[Mapping[str, Any]], names: set[str]) -> list[RowFormat]:
    if {"context", "answers"} <= names and "answer" not in names and "choices" not in names:
        return [squad()]
    answers = [name for name in ("answer", "answers", "answerKey") if name in names]
    if "choices" in names:
        shown = DataFields(input_field="question", choices_field="choices", context_field=_context(names))
        return [mapped(_with_target(shown, name), "multiple choice") for name in answers] or [
            mapped(shown, "multiple choice")
        ]
    if answers == ["answer"] and all(isinstance(row.get("answer"), str) and FINAL in row["answer"] for row in rows):
        return [gsm8k()]
    fields = DataFields(input_field="question", context_field=_context(names))
    formats = [mapped(_with_target(fields, name), "question and answer") for name in answers if name != "answerKey"]
    alone = names - IDENTIFIERS <= {"question", "context"}
    return formats or ([mapped(fields, "question and answer")] if alone else [])


def _context(names: set[str]) -> str | None:
    return "context" if "context" in names else None


def _with_target(fields: DataFields, name: str) -> DataFields:
    return replace(fields, target_field=(name,))


def _classes(columns: Sequence[str], others: bool) -> list[RowFormat]:
    """Format of a class with its text or known pair of texts; empty if a further column could be meant."""
    texts = [name for name in columns if name != LABEL and name.lower() not in IDENTIFIERS]
    pair = next((names for names in PAIRS if set(names) == set(texts)), None)
    if pair is not None:
        return [mapped(DataFields(input_field=pair[0], pair_field=pair[1], label_field=LABEL), "classes")]
    if len(texts) == 1:
        return [mapped(DataFields(input_field=texts[0], label_field=LABEL), "classes")]
    # beside another format, the class makes the data ambiguous
    return [mapped(DataFields(input_field=texts[0], label_field=LABEL), "classes")] if others and texts else []


def _is_chat(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return all(isinstance(row.get(column), list) for row in rows)


def _hint(columns: Sequence[str]) -> str:
    if LABEL not in columns:
        return ""
    texts = [name for name in columns if name != LABEL and name.lower() not in IDENTIFIERS]
    shown = f"; beside 'label' there are {len(texts)} columns, {listed(texts, 100)}"
    if len(texts) < 2:
        return shown
    advice = "name --text-field, --label-field, and --explanation-field or --spans-field"
    return f"{shown}. If one of them explains the label, {advice}"
