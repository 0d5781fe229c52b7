"""Text formats of records: inputs that start with `explain` request an explanation after the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from graftwork.errors import DataError
from graftwork.metrics.spans import Span, merge_spans
from graftwork.tasks.eraser import Evidence, token_places
from graftwork.tasks.esnli import LABELS as NLI_LABELS
from graftwork.tasks.spans import collapsed, find_text

SEPARATOR = " explanation: "
"""Separator before each explanation in a target."""

UNLABELLED = "<unk>"
"""Target of a row without a label; such rows are excluded from training."""

SENTIMENTS: tuple[str, ...] = ("negative", "positive")
TRUTHS: tuple[str, ...] = ("False", "True")

RationaleOrder = Literal["text", "file"]


class FormattedExample(NamedTuple):
    """Input and target of a text-to-text model."""

    inputs: str
    targets: str


def with_explanations(label: str, explanations: Sequence[str]) -> str:
    """Build a target: the label, then each explanation after a separator.

    Example:
        >>> with_explanations("neutral", ["it may rain"])
        'neutral explanation: it may rain'
    """
    return label + "".join(SEPARATOR + text for text in explanations)


def esnli(
    fields: Mapping[str, Any],
    *,
    prefix: str = "explain nli",
    drop_explanations: bool = False,
    add_choices: bool = False,
) -> FormattedExample:
    """Format an entailment pair with up to three explanations; the hypothesis is first.

    Source: the code of Narang et al. 2020, whose order of fields differs from the paper's diagram.
    """
    inputs = f"{prefix} hypothesis: {fields['hypothesis']} premise: {fields['premise']}"
    if add_choices:
        inputs += "".join(f" choice: {label}" for label in NLI_LABELS)
    index = int(fields["label"])
    label = NLI_LABELS[index] if index >= 0 else UNLABELLED
    found = [fields.get(f"explanation_{number}", "") for number in (1, 2, 3)]
    return FormattedExample(inputs, with_explanations(label, [] if drop_explanations else list(filter(None, found))))


def cos_e(
    fields: Mapping[str, Any],
    *,
    prefix: str = "explain cos_e",
    question_prefix: str = "question:",
    choice_prefix: str = "choice:",
    drop_explanations: bool = False,
) -> FormattedExample:
    """Format a multiple-choice question with one explanation; the label is the text of the answer.

    Args:
        fields: Fields of the record.
        prefix: First words of the input.
        question_prefix: Word before the question.
        choice_prefix: Word before each choice.
        drop_explanations: Use the label alone as the target.
    """
    choices = "".join(f" {choice_prefix} {choice}" for choice in fields["choices"])
    reason = fields.get("abstractive_explanation", "")
    reasons = [reason] if reason and not drop_explanations else []
    return FormattedExample(
        f"{prefix} {question_prefix} {fields['question']}{choices}", with_explanations(fields["answer"], reasons)
    )


def extractive_explanations(
    fields: Mapping[str, Any],
    *,
    prefix: str = "explain sentiment",
    input_feature: str = "review",
    output_classes: Sequence[str] = SENTIMENTS,
    drop_explanations: bool = False,
    rationale_order: RationaleOrder = "text",
) -> FormattedExample:
    """Format a text whose explanations are spans of it.

    Differs from the authors' code: spans are in reading order and overlapping spans are merged; the code keeps the
    arbitrary order of the file, which is `rationale_order="file"`.

    Args:
        fields: Fields of the record.
        prefix: First words of the input.
        input_feature: Name of the text field.
        output_classes: Label words by class index.
        drop_explanations: Use the label alone as the target.
        rationale_order: Order of the spans.
    """
    text = fields[input_feature]
    spans = () if drop_explanations else rationale_texts(text, fields, rationale_order)
    label = output_classes[int(fields["label"])]
    return FormattedExample(f"{prefix} {input_feature}: {text}", with_explanations(label, spans))


def eraser_multi_rc(
    fields: Mapping[str, Any],
    *,
    prefix: str = "explain multirc",
    drop_explanations: bool = False,
    rationale_order: RationaleOrder = "text",
) -> FormattedExample:
    """Format a passage, a question and a candidate answer, with the sentences of the passage that are evidence.

    Raises:
        DataError: If question and answer are not separated by "||".
    """
    question, answer = split_query(fields["query_and_answer"])
    passage = fields["passage"]
    spans = () if drop_explanations else rationale_texts(passage, fields, rationale_order)
    inputs = f"{prefix} passage: {passage} query: {question} answer: {answer}"
    return FormattedExample(inputs, with_explanations(TRUTHS[int(fields["label"])], spans))


def split_query(text: str) -> tuple[str, str]:
    """Split a MultiRC field into question and answer; text after a second "||" is ignored.

    Raises:
        DataError: If the field has no "||".
    """
    parts = text.split("||")
    if len(parts) < 2:
        raise DataError(
            f"Found query_and_answer {text[:60]!r}; expected a question and an answer separated by '||'. "
            "Fix the record."
        )
    return parts[0].strip(), parts[1].strip()


def imdb_reviews(
    fields: Mapping[str, Any], *, prefix: str = "sentiment", style: Literal["colon", "review"] = "colon"
) -> FormattedExample:
    """Format a review with its label; `style="review"` uses the input format of the movie rationales."""
    index = int(fields["label"])
    label = SENTIMENTS[index] if index >= 0 else UNLABELLED
    return FormattedExample(
        f"{prefix}: {fields['text']}" if style == "colon" else f"{prefix} review: {fields['text']}", label
    )


def amazon_reviews(
    fields: Mapping[str, Any], *, prefix: str = "sentiment", binary_output: bool = True
) -> FormattedExample | None:
    """Format a product review; returns None for three stars if the label is binary."""
    stars = int(fields["star_rating"])
    if binary_output and stars == 3:
        return None
    label = SENTIMENTS[stars > 3] if binary_output else str(stars)
    return FormattedExample(f"{prefix} review: {fields['review_headline']} {fields['review_body']}", label)


class GoldRationales(NamedTuple):
    """Annotated spans of one document."""

    spans: tuple[Span, ...]
    """Character offsets in reading order, overlapping spans merged."""
    texts: tuple[str, ...]
    """Text of each span, with single spaces between its words."""
    unmatched: int
    """Number of snippets without offsets whose text is not in the document."""
    empty: int
    """Number of snippets without a token."""


def gold_rationales(text: str, fields: Mapping[str, Any]) -> GoldRationales:
    """Find the rationales of a record: by offsets if present, otherwise by the first match of each snippet.

    Args:
        text: The document.
        fields: `groups` of ERASER's evidence with token offsets, or `evidences` with texts; `span_offsets` with
            character offsets.
    """
    groups: Sequence[Sequence[Evidence]] = fields.get("groups", ())
    snippets = [entry for group in groups for entry in group]
    if "groups" not in fields:
        snippets = [Evidence(evidence) for evidence in fields.get("evidences", ())]
    places = token_places(text) if any(entry.start is not None for entry in snippets) else []
    found: list[Span] = list(fields.get("span_offsets", ()))
    unmatched = empty = 0
    for snippet in snippets:
        start, end = snippet.start, snippet.end
        if start is None or end is None:
            span, _ = find_text(text, snippet.text)
            if span is not None:
                found.append(span)
            elif snippet.text.split():
                unmatched += 1
            else:
                empty += 1
        elif start == end:
            empty += 1
        else:
            found.append((places[start][0], places[end - 1][1]))
    spans = merge_spans(found)
    return GoldRationales(spans, tuple(collapsed(text[start:end]) for start, end in spans), unmatched, empty)


def rationale_texts(text: str, fields: Mapping[str, Any], order: RationaleOrder) -> tuple[str, ...]:
    """Texts of the rationales, in the order of the text or of the file."""
    return tuple(fields.get("evidences", ())) if order == "file" else gold_rationales(text, fields).texts
