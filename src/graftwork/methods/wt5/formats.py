"""How a record is worded for a text-to-text model: `explain` in front asks for a reason behind the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from graftwork.errors import DataError
from graftwork.metrics.spans import Span, merge_spans
from graftwork.tasks.eraser import Evidence, document_tokens
from graftwork.tasks.esnli import LABELS as NLI_LABELS

SEPARATOR = " explanation: "
"""Stands before each reason in a target."""

UNLABELLED = "<unk>"
"""The target of a row without a label; such rows are never trained on."""

SENTIMENTS: tuple[str, ...] = ("negative", "positive")
TRUTHS: tuple[str, ...] = ("False", "True")

RationaleOrder = Literal["text", "file"]


class FormattedExample(NamedTuple):
    """What goes into the model, and what should come out."""

    inputs: str
    targets: str


def with_explanations(label: str, explanations: Sequence[str]) -> str:
    """The target: a label, then each reason behind the separator.

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
    """An entailment pair with up to three reasons; the hypothesis comes first.

    Source: Narang et al. 2020, the code, whose order of fields is not that of the paper's diagram.
    """
    inputs = f"{prefix} hypothesis: {fields['hypothesis']} premise: {fields['premise']}"
    if add_choices:
        inputs += "".join(f" choice: {label}" for label in NLI_LABELS)
    label = NLI_LABELS[fields["label"]] if fields["label"] >= 0 else UNLABELLED
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
    """A multiple-choice question with one reason; the label is the answer's text."""
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
    """A text whose reasons are literal spans of it.

    Differs from the authors' code: spans come in reading order, overlapping ones merged, where the code keeps the
    arbitrary order of the file, which is `rationale_order="file"`.
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
    """A passage, a question and one candidate answer to judge, with the sentences that decide.

    Raises:
        DataError: If question and answer are not parted by "||".
    """
    question, answer = split_query(fields["query_and_answer"])
    passage = fields["passage"]
    spans = () if drop_explanations else rationale_texts(passage, fields, rationale_order)
    inputs = f"{prefix} passage: {passage} query: {question} answer: {answer}"
    return FormattedExample(inputs, with_explanations(TRUTHS[fields["label"]], spans))


def split_query(text: str) -> tuple[str, str]:
    """Question and answer of MultiRC; what follows a second "||" is ignored.

    Raises:
        DataError: If there is no "||".
    """
    parts = text.split("||")
    if len(parts) < 2:
        raise DataError(
            f"Found query_and_answer {text[:60]!r}; expected a question and an answer parted by '||'. Mend the record."
        )
    return parts[0].strip(), parts[1].strip()


def imdb_reviews(
    fields: Mapping[str, Any], *, prefix: str = "sentiment", style: Literal["colon", "review"] = "colon"
) -> FormattedExample:
    """A review with a label alone; `style="review"` words it as the movie rationales are."""
    label = SENTIMENTS[fields["label"]] if fields["label"] >= 0 else UNLABELLED
    return FormattedExample(
        f"{prefix}: {fields['text']}" if style == "colon" else f"{prefix} review: {fields['text']}", label
    )


def amazon_reviews(
    fields: Mapping[str, Any], *, prefix: str = "sentiment", binary_output: bool = True
) -> FormattedExample | None:
    """A product review; three stars are left out where the label is binary."""
    stars = int(fields["star_rating"])
    if binary_output and stars == 3:
        return None
    label = SENTIMENTS[stars > 3] if binary_output else str(stars)
    return FormattedExample(f"{prefix} review: {fields['review_headline']} {fields['review_body']}", label)


def hypothesis_prediction(
    fields: Mapping[str, Any], *, prefix: str = "hyp", label_names: Sequence[str] = NLI_LABELS
) -> FormattedExample:
    """Premise and label in, hypothesis out. No built-in task uses it."""
    return FormattedExample(
        f"{prefix} premise: {fields['premise']} label: {label_names[fields['label']]}", fields["hypothesis"]
    )


def mask_named_entities(fields: Mapping[str, Any], *, prefix: str = "nem") -> list[FormattedExample]:
    """One example for each entity (character offset, length) of a sentence. No built-in task uses it."""
    text = fields["text"]
    return [
        FormattedExample(f"{prefix}: {text[:start]}_X_{text[start + length :]}", text[start : start + length])
        for start, length in fields["entities"]
    ]


class GoldRationales(NamedTuple):
    """The marked spans of one document, ready to be learned and scored."""

    spans: tuple[Span, ...]
    """In reading order, overlapping ones merged."""
    texts: tuple[str, ...]
    unmatched: int
    """Snippets without offsets whose text is not in the document."""
    empty: int
    """Snippets without any token."""


def gold_rationales(text: str, fields: Mapping[str, Any]) -> GoldRationales:
    """The rationales of a record: offsets where it has them, else the first place of each snippet."""
    tokens = document_tokens(text)
    snippets = [entry for group in fields.get("groups", ()) for entry in group]
    if "groups" not in fields:
        snippets = [Evidence(evidence) for evidence in fields.get("evidences", ())]
    found: list[Span] = []
    unmatched = empty = 0
    for snippet in snippets:
        start, end = snippet.start, snippet.end
        if start is None or end is None:
            words = snippet.text.split()
            places = range(len(tokens) - len(words) + 1) if words else range(0)
            start = next((place for place in places if tokens[place : place + len(words)] == words), None)
            if words and start is None:
                unmatched += 1
                continue
            start = start or 0
            end = start + len(words)
        if start == end:
            empty += 1
        else:
            found.append((start, end))
    spans = merge_spans(found)
    return GoldRationales(spans, tuple(" ".join(tokens[start:end]) for start, end in spans), unmatched, empty)


def rationale_texts(text: str, fields: Mapping[str, Any], order: RationaleOrder) -> tuple[str, ...]:
    """The snippets to print, in the order of the text or as the file has them."""
    return tuple(fields.get("evidences", ())) if order == "file" else gold_rationales(text, fields).texts
