"""Formats of rows: mapped columns, chat, Alpaca, SQuAD, GSM8K; each turns a row into an input with its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.errors import DataError
from graftwork.settings.fields import DataFields
from graftwork.tasks.own_data.teacher import Kept
from graftwork.tasks.own_data.values import Turn, chosen, conversation, field, listed, options, text, texts
from graftwork.tasks.templates import Template, parse_template

FINAL = "#### "
"""Mark before the final answer in GSM8K."""
ALPACA = (
    "Below is an instruction that describes a task{extra}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n"
)
"""Beginning of the prompt of Stanford Alpaca (`tatsu-lab/stanford_alpaca`, `train.py`)."""
ALPACA_EXTRA = ", paired with an input that provides further context"


@dataclass(frozen=True, slots=True)
class Parts:
    """Input and answers of one row."""

    input: str
    target: str | None
    """Target text of training; None if the row has none."""
    answers: tuple[str, ...] = ()
    """Accepted answers."""
    pair: str | None = None
    turns: tuple[Turn, ...] = ()
    """Conversation up to the reference, which is its last turn, or up to the question if there is no reference."""
    choices: tuple[str, ...] = ()
    explanations: tuple[str, ...] = ()
    """Explanations in free text."""
    spans: tuple[tuple[int, int], ...] = ()
    """Explanations as character offsets of the input."""
    unmatched: int = 0
    """Number of quotes that are not in the input."""
    kept: Kept | None = None
    """Outputs of a language model that are kept and left out; None if there are none."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Format of the rows of a data set."""

    name: str
    """Name for messages: "Alpaca", "chat", …; empty for mapped columns."""
    uses: str
    """Columns that are used, such as "question → answer"."""
    read: Callable[[Mapping[str, Any], str, bool], Parts]
    """Reads a row, given its place; the last argument is True if an answer is required."""
    scores: str = "text"
    """Kind of metrics: text, classes, options, final_answer, spans, free_text or explained."""


def mapped(fields: DataFields, name: str = "") -> RowFormat:
    """Return the format of explicitly named columns.

    Args:
        fields: The mapping.
        name: Name of the recognised format; empty if the user gave the mapping.

    Raises:
        ConfigError: If a template is malformed.
    """
    if fields.messages_field is not None:
        return chat(fields.messages_field)
    template = parse_template(fields.input_template, "input_template") if fields.input_template is not None else None
    target = parse_template(fields.target_template, "target_template") if fields.target_template is not None else None

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        choices = [] if fields.choices_field is None else _options(row, fields.choices_field, where)
        shown = " ".join(f"({key}) {option}" for key, option in choices)
        if template is not None:
            source = _filled(template, row, where, "input_template", {"choices": shown} if choices else {})
        else:
            source = text(_named(row, fields, "input_field", where), fields.input_field or "", where)
            source = f"{source} {shown}" if choices else source
        if fields.context_field is not None:
            passage = text(_named(row, fields, "context_field", where), fields.context_field, where)
            source = f"question: {source} context: {passage}"
        pair = None
        if fields.pair_field is not None:
            pair = text(_named(row, fields, "pair_field", where), fields.pair_field, where)
        if target is not None:
            present = required or all(_has(row, column) for column in target.columns)
            answers = [_filled(target, row, where, "target_template", {})] if present else []
        else:
            answers = _answers(row, fields, choices, where, required)
        _require(answers, required, where)
        return Parts(
            source,
            answers[0] if answers else None,
            tuple(answers),
            pair,
            choices=tuple(option for _, option in choices),
        )

    source_names = template.columns if template is not None else (fields.input_field,)
    inputs = [*source_names, fields.pair_field, fields.context_field, fields.choices_field]
    outputs = [*(target.columns if target is not None else fields.targets), fields.label_field]
    shown = [listed(filter(None, names), 100) for names in (inputs, outputs) if any(names)]
    scores = "classes" if fields.label_field else "options" if fields.choices_field else "text"
    return RowFormat(name, " → ".join(shown), read, scores)


def chat(column: str, system: bool = False) -> RowFormat:
    """Return the format of conversations: the last assistant turn is the reference.

    Args:
        column: Column with the list of messages.
        system: Use the column `system`, if a row has one, as the first message.
    """

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        turns = conversation(field(row, column, where, "messages_field"), column, where)
        extra = row.get("system") if system else None
        if isinstance(extra, str) and extra.strip() and turns[0][0] != "system":
            turns = [("system", text(extra, "system", where)), *turns]
        return spoken(turns, where, required)

    return RowFormat("chat", f"{column} → assistant turns", read, "free_text")


def spoken(turns: list[Turn], where: str, required: bool) -> Parts:
    """Return the parts of a conversation, cut after its last assistant turn.

    Raises:
        DataError: If an answer is required and there is no assistant turn, or nothing comes before it.
    """
    last = max((index for index, (role, _) in enumerate(turns) if role == "assistant"), default=-1)
    open_question = not required and turns[-1][0] in ("user", "tool")
    if last < 0:
        _require([], required, where, "assistant turn")
    if open_question or last < 0:
        return Parts(transcript(turns), None, turns=tuple(turns))
    if not any(role == "user" for role, _ in turns[:last]):
        raise DataError(f"{where}: found no user turn before the last assistant turn; expected one. Remove the row.")
    answer = turns[last][1]
    return Parts(transcript(turns[:last]), answer, (answer,), turns=tuple(turns[: last + 1]))


def transcript(turns: list[Turn]) -> str:
    """Return a conversation as text: the message itself if it is the only one, else "role: text" line by line."""
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)


def prompt_completion() -> RowFormat:
    """Return the format with prompt and completion, each a text or a list of messages."""

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        prompt, completion = field(row, "prompt", where), row.get("completion")
        if isinstance(prompt, list):
            turns = conversation(prompt, "prompt", where)
            if completion is not None:
                answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
                turns += conversation(answer, "completion", where)
            return spoken(turns, where, required)
        answers = [] if completion is None else [text(completion, "completion", where)]
        _require(answers, required, where, "text in 'completion'")
        return Parts(text(prompt, "prompt", where), answers[0] if answers else None, tuple(answers))

    return RowFormat("prompt and completion", "prompt → completion", read, "free_text")


def alpaca(context: str, output: str) -> RowFormat:
    """Return the format of Stanford Alpaca, with its prompt.

    Args:
        context: Column with the optional input: "input", or "context" in Dolly.
        output: Column with the response.
    """

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        instruction = text(field(row, "instruction", where), "instruction", where)
        value = row.get(context)
        more = "" if value is None else text(value, context, where)
        prompt = ALPACA.replace("{extra}", ALPACA_EXTRA if more else "", 1).replace("{instruction}", instruction, 1)
        prompt += (f"### Input:\n{more}\n\n" if more else "") + "### Response:"
        answers = [text(row[output], output, where)] if row.get(output) is not None else []
        _require(answers, required, where, f"text in {output!r}")
        return Parts(prompt, answers[0] if answers else None, tuple(answers))

    return RowFormat("Alpaca", f"instruction, {context} → {output}", read, "free_text")


def squad() -> RowFormat:
    """Return the format of SQuAD rows: question, context, and answers as texts; no answer is the empty text."""

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        question = text(field(row, "question", where), "question", where)
        passage = text(field(row, "context", where), "context", where)
        given = row.get("answers")
        if given is None and required:
            field(row, "answers", where)
        found = [] if given is None else texts(given, "answers", where)
        answers = tuple(dict.fromkeys(found)) if found or given is None else ("",)
        return Parts(f"question: {question} context: {passage}", answers[0] if answers else None, answers)

    return RowFormat("SQuAD", "question, context → answers", read, "spans")


def gsm8k() -> RowFormat:
    """Return the format of GSM8K: the target is the whole solution, and the text after "####" is scored."""

    def read(row: Mapping[str, Any], where: str, required: bool) -> Parts:
        question = text(field(row, "question", where), "question", where)
        if row.get("answer") is None and not required:
            return Parts(question, None)
        solution = text(field(row, "answer", where), "answer", where)
        if FINAL not in solution:
            raise DataError(f"{where}: found no {FINAL!r} in field 'answer'; expected it before the final answer.")
        return Parts(question, solution, (final_answer(solution),))

    return RowFormat("GSM8K", "question → answer, scored after ####", read, "final_answer")


def final_answer(solution: str) -> str:
    """Return the number after the last "####", without commas and currency signs; empty if there is none."""
    _, mark, after = solution.rpartition(FINAL.strip())
    line = after.strip().partition("\n")[0] if mark else ""
    return line.strip().replace(",", "").replace("$", "").rstrip(".")


def _named(row: Mapping[str, Any], fields: DataFields, setting: str, where: str) -> Any:
    return field(row, str(getattr(fields, setting)), where, setting)


def _has(row: Mapping[str, Any], column: str) -> bool:
    return row.get(column, row.get(column.partition(".")[0])) is not None


def _filled(template: Template, row: Mapping[str, Any], where: str, setting: str, known: Mapping[str, str]) -> str:
    def value(column: str) -> str:
        if column in known and column not in row:
            return known[column]
        return text(field(row, column, where, setting), column, where, numbers=True)

    return template.fill(value)


def _options(row: Mapping[str, Any], column: str, where: str) -> list[tuple[str, str]]:
    return options(field(row, column, where, "choices_field"), column, where)


def _answers(
    row: Mapping[str, Any], fields: DataFields, choices: list[tuple[str, str]], where: str, required: bool
) -> list[str]:
    setting = "label_field" if fields.label_field else "target_field"
    names = (fields.label_field,) if fields.label_field else fields.targets
    found: list[str] = []
    for name in names:
        if not required and not _has(row, name):
            continue
        value = field(row, name, where, setting)
        if choices:
            found.append(chosen(value, choices, name, where))
        elif fields.label_field:
            found.append(text(value, name, where, numbers=True).strip())
        else:
            found += texts(value, name, where)
    return list(dict.fromkeys(found))


def _require(answers: list[str], required: bool, where: str, what: str = "answer") -> None:
    if required and not answers:
        raise DataError(f"{where}: found no {what}; expected at least one. Fix or remove the row.")
