"""Tasks on data sets with explanations that the paper does not use; their names begin with `explained/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graftwork.methods.wt5 import formats
from graftwork.methods.wt5.formats import FormattedExample, rationale_texts, with_explanations
from graftwork.methods.wt5.templates import Abstractive, Extractive, Template, abstractive_metrics, extractive_metrics
from graftwork.settings.lengths import PROFILES, Lengths
from graftwork.tasks import explained_sets as sets
from graftwork.tasks.sources import Source
from graftwork.tasks.task import Task

LONG, SHORT = Lengths(2048, 512), Lengths(512, 256)
_ALL = ("train", "validation", "test")


def passage(fields: Mapping[str, Any], *, prefix: str, classes: tuple[str, ...]) -> FormattedExample:
    """Format a text with spans, followed by a question or claim if there is one.

    Args:
        fields: `passage`, `query` (may be empty), `label`, and the spans.
        prefix: First words of the input.
        classes: Labels by class index.
    """
    text, query = fields["passage"], fields["query"]
    asked = f" query: {query}" if query else ""
    return FormattedExample(
        f"{prefix} passage: {text}{asked}",
        with_explanations(classes[int(fields["label"])], rationale_texts(text, fields, "text")),
    )


def post(fields: Mapping[str, Any], *, prefix: str, classes: tuple[str, ...]) -> FormattedExample:
    """Format a post with spans.

    Args:
        fields: `post`, `label` and `span_offsets`.
        prefix: First words of the input.
        classes: Labels by class index.
    """
    spans = rationale_texts(fields["post"], fields, "text")
    return FormattedExample(f"{prefix} post: {fields['post']}", with_explanations(classes[int(fields["label"])], spans))


def _spans(
    name: str, source: Source, classes: tuple[str, ...], splits: tuple[str, ...], lengths: Lengths, field: str
) -> Task:
    parser = Extractive("fixed", "whitespace")
    format = passage if field == "passage" else post
    return Task(
        name=f"explained/{name}",
        source=source,
        format=Template(format, {"prefix": f"explain {name}", "classes": classes}, classes, field),
        parse=parser,
        metrics=extractive_metrics(parser),
        splits=splits,
        lengths=lengths,
        new_tokens=None,
        description="label and spans of the text",
    )


def _tasks() -> Iterator[Task]:
    yield _spans("boolq", sets.BOOLQ, sets.BOOLQ_CLASSES, _ALL, LONG, "passage")
    yield _spans("fever", sets.FEVER, sets.FEVER_CLASSES, _ALL, LONG, "passage")
    yield _spans("evidence_inference", sets.EVIDENCE_INFERENCE, sets.INFERENCE_CLASSES, _ALL, LONG, "passage")
    yield _spans("eraser_esnli", sets.ERASER_ESNLI, sets.NLI_CLASSES, _ALL, SHORT, "passage")
    yield _spans("scifact", sets.SciFactFiles(), sets.CLAIM_CLASSES, ("train", "validation"), LONG, "passage")
    yield _spans("hatexplain", sets.HateXplainFiles(), sets.POST_CLASSES, _ALL, SHORT, "post")
    yield Task(
        name="explained/ecqa",
        source=sets.EcqaFiles(),
        format=Template(formats.cos_e, {"prefix": "explain ecqa"}),
        parse=Abstractive("fixed"),
        metrics=abstractive_metrics("fixed"),
        splits=_ALL,
        lengths=Lengths(PROFILES["cos_e"].input, 256),
        new_tokens=None,
        description="label and free-text explanation",
    )


TASKS: Mapping[str, Task] = {task.name: task for task in _tasks()}
"""Tasks by name."""
