"""Outputs of a language model as explanations: parsed, and kept where their label is right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from graftwork.core.readers import shorten
from graftwork.errors import DataError
from graftwork.tasks.own_data.rows import Row, open_json, open_rows
from graftwork.tasks.own_data.values import LETTERS, texts

COLUMN = "teacher outputs"
"""Column that `with_outputs` adds to rows."""
OUTPUT_FIELDS = ("outputs", "output")
"""Fields with the outputs for one row in a file of outputs, whose field `id` names the row."""

_NEXT = re.compile(r"\b(?:Q|Premise):")
"""Beginning of the next question, which a model with examples in its prompt often generates next."""
_ANSWER = re.compile(r"\b(?:So the answer is|The answer is|the answer is|Answer:)")
_OPTION = re.compile(r"\((\w)\)\s*")


class Output(NamedTuple):
    """One parsed output."""

    reason: str
    label: str
    letter: str = ""
    """Letter of the option before the label, such as "a"; empty if there is none."""


class Kept(NamedTuple):
    """Reasons of the outputs for one row."""

    reasons: tuple[str, ...]
    wrong: int = 0
    """Number of outputs with another label."""
    unread: int = 0
    """Number of outputs without a label or without a reason."""
    first: str = ""
    """Place and beginning of the first output that is left out."""


def parse_output(text: str) -> Output | None:
    """Parse reason and label of an output in the forms of chain-of-thought prompts; None if one is missing.

    The label follows "So the answer is", "The answer is" or "Answer:", after the letter of an option in parentheses and
    before a full stop. Text from "Q:" or "Premise:" on belongs to a question that the model made up.

    Source: the parsers of `google-research/distilling-step-by-step` (`data_utils.py`).
    Differs from them: one parser for all data sets; the last of several marks counts instead of an error.

    Args:
        text: The output.

    Example:
        >>> parse_output("Trunks carry spares. So the answer is (a) boot. Q: What")
        Output(reason='Trunks carry spares.', label='boot', letter='a')
    """
    own = _NEXT.split(text, maxsplit=1)[0]
    marks = list(_ANSWER.finditer(own))
    if not marks:
        return None
    reason, rest = own[: marks[-1].start()].strip(), own[marks[-1].end() :].strip(" :\n\t")
    option = _OPTION.match(rest)
    label = rest[option.end() :] if option else rest
    found = Output(reason, label.strip().removesuffix(".").strip(), option[1] if option else "")
    return found if reason and (found.label or found.letter) else None


def keep_right(outputs: Sequence[str], label: str, choices: Sequence[str], places: Sequence[str]) -> Kept:
    """Return the reasons of the outputs whose label is right, without repetitions.

    Args:
        outputs: Outputs for one row.
        label: Label of the row.
        choices: Options of the row, for outputs that name a letter only; empty if it has none.
        places: File and line of each output, for the report.
    """
    reasons: dict[str, None] = {}
    wrong = unread = 0
    first = ""
    for text, place in zip(outputs, places, strict=True):
        parsed = parse_output(text)
        if parsed is not None and _named(parsed, choices).casefold() == label.casefold():
            reasons[parsed.reason] = None
            continue
        wrong += parsed is not None
        unread += parsed is None
        first = first or f"{place}: {shorten(text, 60)}"
    return Kept(tuple(reasons), wrong, unread, first)


def _named(output: Output, choices: Sequence[str]) -> str:
    """Label of an output; that of its letter if there is no text after it."""
    place = LETTERS.lower().find(output.letter.lower()) if output.letter else -1
    return choices[place] if not output.label and 0 <= place < len(choices) else output.label


def with_outputs(rows: Iterator[Row], files: Sequence[str]) -> Iterator[Row]:
    """Add the outputs of files to the rows that they belong to.

    Args:
        rows: Rows of the data.
        files: Files of outputs: JSON arrays of texts, one text for each row in the order of rows and files; or rows
            with `id` and `output` or `outputs`, of which any number belong to the row with that `id`.

    Raises:
        DataError: If a file is of neither kind, both kinds are mixed, or no output belongs to a row.
    """
    named: dict[str, list[tuple[str, str]]] = {}
    listed: list[tuple[str, str]] = []
    for file in files:
        if (items := _list_of_texts(Path(file))) is not None:
            listed += [(text, f"{file}, item {number}") for number, text in enumerate(items, start=1)]
            continue
        for where, row in open_rows(Path(file)).rows():
            field = next((name for name in OUTPUT_FIELDS if name in row), None)
            if field is None or "id" not in row:
                raise DataError(
                    f"{where}: found the fields {', '.join(map(str, row))}; expected id and output, or a JSON list of "
                    "texts with one text for each row. Rename the fields."
                )
            own = named.setdefault(str(row["id"]), [])
            own += [(text, where) for text in texts(row[field], field, where)]
    if named and listed:
        raise DataError(f"Found outputs with and without ids in {', '.join(files)}; expected one kind.")
    used = count = 0
    for where, row in rows:
        outputs = named.get(str(row.get("id", "")), []) if named else listed[count : count + 1]
        used += bool(outputs)
        count += 1
        yield where, {**row, COLUMN: outputs}
    if listed and len(listed) != count:
        raise DataError(
            f"{', '.join(files)}: found {len(listed)} outputs for {count} rows; expected one for each row, in their "
            "order. Complete the files, or give ids."
        )
    if not used:
        raise DataError(f"{', '.join(files)}: found no output with the id of a row; expected one. Check the ids.")


def outputs_of(value: Any, name: str, where: str) -> tuple[list[str], list[str]]:
    """Return the outputs in a column, and the place of each.

    Args:
        value: Value of the column: a text, a list of texts, or what `with_outputs` has added.
        name: Name of the column.
        where: File and place of the row.
    """
    if name == COLUMN:
        pairs = cast("list[tuple[str, str]]", value)
        return [text for text, _ in pairs], [place for _, place in pairs]
    found = [] if value is None else [text for text in texts(value, name, where) if text.strip()]
    return found, [where] * len(found)


def _list_of_texts(path: Path) -> list[str] | None:
    """Texts of a JSON array; None for a file of rows."""
    value = open_json(path)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in cast("list[Any]", value)):
        return None
    return cast("list[str]", value)


def report(facts: Mapping[str, Any]) -> str:
    """Part of a line on what was kept and what was left out; empty without outputs.

    Args:
        facts: `kept`, `wrong`, `unread` and `first` of all rows.
    """
    kept, wrong, unread = (int(facts.get(name, 0)) for name in ("kept", "wrong", "unread"))
    if not kept + wrong + unread:
        return ""
    out = f"; left out: {wrong:,} with another label, {unread:,} without label or reason" if wrong + unread else ""
    first = f" (first: {facts['first']})" if wrong + unread else ""
    return f", {kept:,} of {kept + wrong + unread:,} outputs of the teacher kept{out}{first}"
