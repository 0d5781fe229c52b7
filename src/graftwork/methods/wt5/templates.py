"""Building blocks of the task tables: templates from records to examples, parsers of answers, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork.core.example import Example, Examples
from graftwork.methods.wt5.formats import (
    SEPARATOR,
    UNLABELLED,
    FormattedExample,
    RationaleOrder,
    gold_rationales,
    with_explanations,
)
from graftwork.methods.wt5.orders import answer_order
from graftwork.methods.wt5.parsing import (
    Mode,
    abstractive_explanations,
    extractive_explanations,
    span_fields,
    string_label_to_class_id,
)
from graftwork.metrics.classification import accuracy, f1a
from graftwork.metrics.metric import Metric, MetricGroup
from graftwork.metrics.spans import extractive_explanations_metric
from graftwork.metrics.text import bleu_signature, esnli_metric
from graftwork.tasks.offsets import ESCAPE, PARTS
from graftwork.tasks.sources import Record

NAN = float("nan")

EXPLANATION_SCORES = (
    "bleu",
    "bleu_correct_only",
    "avg_explanation_length",
    "avg_explanation_count",
    "explanation_rate",
    "token_f1",
    "chance_token_f1",
    "span_f1",
    "token_precision",
    "token_recall",
    "iou_f1",
    "spans_found",
    "unmatched_rate",
)
"""Metrics of explanations, undefined where no prompt asks for one."""

Format = Callable[..., FormattedExample | None]
"""Function from the fields of a record and keyword options to an example, or None to exclude the record."""


@dataclass(frozen=True, slots=True)
class Template:
    """Template from records to examples; stores label, explanations and source as metadata for the metrics."""

    format: Format
    """Format of the texts."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of the format."""
    classes: tuple[str, ...] = ()
    """Labels; empty if the choices of each record are its labels."""
    source: str | None = None
    """Field whose spans are the explanations; a name that is no field selects the text after the prompt. None for
    free-text explanations."""
    first_group_only: bool = False
    """Use only the first group of evidence, as in the authors' MultiRC data."""

    def __call__(self, record: Record) -> Example | None:
        """Format a record; None if the format excludes it."""
        fields = record.fields
        if self.first_group_only:
            groups = tuple(fields["groups"][:1])
            texts = tuple(entry.text for group in groups for entry in group)
            fields = {**fields, "groups": groups, "evidences": texts}
        formatted = self.format(fields, **self.options)
        if formatted is None:
            return None
        parsed = abstractive_explanations(formatted.targets, mode="reference")
        metadata: dict[str, Any] = {
            "label": parsed["label"],
            "explanations": tuple(parsed["explanations"]),
            "choices": self.classes or tuple(dict.fromkeys(fields["choices"])),
            "explain": formatted.inputs.startswith("explain "),
            "labelled": parsed["label"] != UNLABELLED,
            ESCAPE: True,
        }
        if self.source is not None:
            metadata |= _source_of(formatted, fields, self.source)
            if self.options.get("rationale_order") == "file":
                # the authors' code cuts targets without regard to their spans
                metadata.pop(PARTS, None)
        return Example(record.key, formatted.inputs, formatted.targets, (formatted.targets,), metadata)


def _source_of(formatted: FormattedExample, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Metadata of an extractive example: source text, its position in the input, gold spans, parts of the target."""
    # every prompt ends its first field name with a colon
    start = formatted.inputs.index(": ") + 2
    text = fields[name] if name in fields else formatted.inputs[start:]
    gold = gold_rationales(text, fields)
    named: dict[str, Any] = {}
    if "document_name" in fields:
        named = {"document": fields["document_name"], "class_names": tuple(fields["class_names"])}
    label = formatted.targets.split(SEPARATOR, 1)[0]
    if gold.texts and formatted.targets == with_explanations(label, gold.texts):
        # a source that contains the separator does not end an explanation
        named |= {
            "explanations": gold.texts,
            PARTS: (
                (label, 0),
                *((SEPARATOR + own, start + end) for own, (_, end) in zip(gold.texts, gold.spans, strict=True)),
            ),
        }
    return {
        **named,
        "source": text,
        "source_start": start,
        "spans": gold.spans,
        "gold_unmatched": gold.unmatched,
        "gold_empty": gold.empty,
    }


@dataclass(frozen=True, slots=True)
class Abstractive:
    """Parser of answers with free-text explanations."""

    mode: Mode = "fixed"

    def __call__(self, text: str, example: Example) -> dict[str, Any]:
        """Parse label and explanations."""
        return abstractive_explanations(text, mode=self.mode, order=answer_order(example))

    def located(self, answer: Mapping[str, Any], text: str, example: Example) -> dict[str, Any]:
        """Label and explanations that were read from the tokens; reference mode parses the text."""
        if self.mode == "reference":
            return self(text, example)
        return {"label": answer["label"], "explanations": list(answer["explanations"])}


@dataclass(frozen=True, slots=True)
class Extractive:
    """Parser of answers whose explanations are spans of the source."""

    mode: Mode = "fixed"
    tokenizer: str = "whitespace"

    def __call__(self, text: str, example: Example) -> dict[str, Any]:
        """Parse label, spans and matched explanations."""
        fields = {"inputs_pretokenized": example.input, "source": example.metadata["source"]}
        order = answer_order(example)
        return extractive_explanations(text, example=fields, tokenizer=self.tokenizer, mode=self.mode, order=order)

    def located(self, answer: Mapping[str, Any], text: str, example: Example) -> dict[str, Any]:
        """Label and spans that were read from the tokens; reference mode parses the text."""
        if self.mode == "reference":
            return self(text, example)
        spans = [(start, end) for start, end in answer.get("spans", ())]
        return {
            **span_fields(answer["label"], spans, example.metadata["source"], self.tokenizer),
            "explanations": list(answer["explanations"]),
            "unmatched": answer.get("unmatched", 0),
            "gold_unmatched": 0,
        }

    def gold(self, example: Example) -> dict[str, Any]:
        """Parse the target: spans from offsets, or by searching the words of the target in reference mode."""
        if self.mode == "reference":
            fields = {"inputs_pretokenized": example.input}
            return extractive_explanations(
                example.target, example=fields, is_target=True, tokenizer=self.tokenizer, mode="reference"
            )
        metadata = example.metadata
        return {
            **span_fields(metadata["label"], metadata["spans"], metadata["source"], self.tokenizer),
            "gold_unmatched": metadata["gold_unmatched"],
        }


@dataclass(frozen=True, slots=True)
class ClassId:
    """Parser of answers as class indices, −1 for invalid classes."""

    classes: tuple[str, ...]

    def __call__(self, text: str, example: Example) -> int:
        """Index of the class equal to the text."""
        return string_label_to_class_id(text, self.classes)

    def located(self, answer: Mapping[str, Any], text: str, example: Example) -> int:
        """Index of the label that was read from the tokens."""
        return string_label_to_class_id(answer["label"], self.classes)


def _numbers(values: Mapping[str, float | None], names: Sequence[str]) -> dict[str, float]:
    found = {name: values[name] for name in names}
    return {name: NAN if value is None else float(value) for name, value in found.items()}


def _parsed_rate(predictions: Sequence[Mapping[str, Any]], examples: Examples) -> float:
    right = sum(
        prediction["label"] in row.metadata["choices"]
        for prediction, row in zip(predictions, examples.rows, strict=True)
    )
    return 100 * right / len(examples.rows)


def abstractive_metrics(mode: Mode = "fixed") -> tuple[MetricGroup, ...]:
    """Metrics of label accuracy, BLEU, and the presence of explanations."""
    names: tuple[str, ...] = ("accuracy", "bleu", "expln1_length")
    if mode == "fixed":
        names = ("accuracy", "bleu", "bleu_correct_only", "avg_explanation_length", "explanation_rate", "parsed_rate")

    def compute(predictions: Sequence[Any], examples: Examples) -> dict[str, float]:
        gold = [
            {"label": row.metadata["label"], "explanations": list(row.metadata["explanations"])}
            for row in examples.rows
        ]
        values: dict[str, float | None] = dict(esnli_metric(gold, predictions, mode=mode))
        return _numbers({**values, "parsed_rate": _parsed_rate(predictions, examples)}, names)

    def note() -> str:
        return f"BLEU: {bleu_signature('var')}"

    return (MetricGroup(names, compute, note=note),)


def extractive_metrics(parser: Extractive, *, question_answering: bool = False) -> tuple[MetricGroup, ...]:
    """Metrics of label accuracy, token F1, span F1, and matched spans.

    Args:
        parser: Parser of the gold spans.
        question_answering: Add the F1 over all answers (F1a) of the paper's MultiRC results.
    """
    if parser.mode == "reference":
        names: tuple[str, ...] = ("accuracy", "f1", "partial match f1", "avg_explanation_count")
        lower: tuple[str, ...] = ()
    else:
        scores = ("token_f1", "chance_token_f1", "span_f1", "token_precision", "token_recall", "iou_f1")
        counts = ("spans_found", "unmatched_rate", "avg_explanation_count", "explanation_rate", "parsed_rate")
        names = ("accuracy", *(("f1a",) if question_answering else ()), *scores, *counts)
        lower = ("unmatched_rate",)

    def compute(predictions: Sequence[Any], examples: Examples) -> dict[str, float]:
        gold = [parser.gold(row) for row in examples.rows]
        values: dict[str, float | None] = dict(extractive_explanations_metric(gold, predictions, mode=parser.mode))
        if parser.mode == "fixed":
            labels = [entry["label"] for entry in predictions]
            explained = sum(bool(entry["explanations"] or entry["unmatched"]) for entry in predictions)
            values["explanation_rate"] = 100 * explained / len(predictions)
            values["parsed_rate"] = _parsed_rate(predictions, examples)
            values["f1a"] = f1a([entry["label"] for entry in gold], labels)
        return _numbers(values, names)

    kinds = {"spacy": "spaCy's English tokens", "words": "words and punctuation marks"}
    tokens = kinds.get(parser.tokenizer, "tokens between white space")
    return (MetricGroup(names, compute, frozenset(lower), note=lambda: f"token F1: {tokens}, {parser.mode} mode"),)


def class_metrics(classes: tuple[str, ...]) -> tuple[Metric, ...]:
    """Metric of the accuracy of class indices."""

    def compute(predictions: Sequence[Any], examples: Examples) -> float:
        gold = [string_label_to_class_id(row.metadata["label"], classes) for row in examples.rows]
        return accuracy(gold, predictions)

    return (Metric("accuracy", compute, description="share of answers equal to the gold class word"),)


def reference_order(mode: Mode) -> RationaleOrder:
    """Order of explanations in targets: as in the text, or as in the file in reference mode."""
    return "file" if mode == "reference" else "text"
