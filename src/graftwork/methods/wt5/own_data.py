"""Own explained data: examples, parsers and metrics of rows with a text, a label and an explanation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from graftwork.core.example import Example
from graftwork.methods.wt5.formats import SEPARATOR, with_explanations
from graftwork.methods.wt5.templates import Abstractive, Extractive, abstractive_metrics, extractive_metrics
from graftwork.tasks.offsets import ESCAPE, PARTS
from graftwork.tasks.own_data.task_file import TaskFile
from graftwork.tasks.sources import Record
from graftwork.tasks.spans import collapsed
from graftwork.tasks.task import Task

PROMPT = "classify text: "
"""Beginning of an input; `explain` before it requests an explanation."""


@dataclass(frozen=True, slots=True)
class OwnFormat:
    """Format of a row: the text after a prompt, and the label with its explanations as the target."""

    labels: tuple[str, ...]
    """Labels in the order of the data set; those of a row with options are its options."""
    spans: bool
    """True if explanations are spans of the text."""
    chat: bool = False
    """True for a conversation: the input is the user's turn, and the target is the assistant's."""
    source: str = "text"
    """Field that lines of plain text fill."""

    def __call__(self, record: Record) -> Example:
        """Format a row; without a label, it is an input for prediction."""
        fields = record.fields
        text = str(fields["text"])
        explain = bool(fields.get("explain", True))
        prompt = f"explain {PROMPT}" if explain else PROMPT
        label = fields.get("label")
        options: tuple[str, ...] = tuple(fields.get("choices", ()))
        more = "".join(f" choice: {option}" for option in options)
        metadata: dict[str, Any] = {"choices": options or self.labels, "explain": explain, ESCAPE: True}
        spans = tuple(fields.get("spans", ())) if self.spans else ()
        reasons = tuple(collapsed(text[start:end]) for start, end in spans)
        reasons = reasons if self.spans else tuple(fields.get("explanations", ()))
        if self.spans:
            unmatched = int(fields.get("unmatched", 0))
            metadata |= {"source": text, "source_start": len(prompt), "spans": spans}
            metadata |= {"gold_unmatched": unmatched, "gold_empty": 0}
        target = ""
        if isinstance(label, str):
            target = with_explanations(label, reasons if explain else ())
            metadata |= {"label": label, "explanations": reasons, "labelled": True}
            if explain and spans:
                ends = (len(prompt) + end for _, end in spans)
                parts = ((SEPARATOR + reason, end) for reason, end in zip(reasons, ends, strict=True))
                metadata[PARTS] = ((label, 0), *parts)
        if self.chat:
            asked = (("user", prompt + text + more),)
            metadata |= {"turns": (*asked, ("assistant", target)) if target else asked}
            metadata["where"] = str(fields.get("where", f"example {record.key}"))
        return Example(record.key, prompt + text + more, target, (target,) if target else (), metadata)


def explained_task(task: Task, definition: TaskFile) -> Task:
    """Return a task on own data with the format, the parser and the metrics of explained answers.

    Args:
        task: Task with the source of the rows.
        definition: Columns and labels of the data.
    """
    spans = definition.spans_field is not None
    parser = Extractive("fixed", "words") if spans else Abstractive("fixed")
    metrics = extractive_metrics(parser) if isinstance(parser, Extractive) else abstractive_metrics("fixed")
    format = OwnFormat(definition.labels, spans, definition.as_chat)
    return replace(task, format=format, parse=parser, metrics=metrics)
