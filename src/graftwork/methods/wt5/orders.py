"""Order of label and explanation: prompts and targets of an example, and the answer to two prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from graftwork.core.example import AUXILIARY, Example
from graftwork.methods.wt5.formats import SEPARATOR, with_explanations
from graftwork.tasks.inputs import EXPLAIN, request_explanation
from graftwork.tasks.offsets import PARTS

Order = Literal["label_first", "reason_first", "separate"]
AnswerOrder = Literal["label_first", "reason_first", "rationale"]
"""Contents of one generated text: label and explanations in either order, or explanations alone."""

LABEL_MARK = "label:"
"""Word before the label of an answer that begins with its explanations."""
ANSWER_ORDER = "answer_order"
"""Metadata field with the `AnswerOrder` of an example; label_first without it."""


def answer_order(row: Example) -> AnswerOrder:
    """Contents of the answer to a prompt; a prompt that asks for no explanation is answered by the label."""
    return row.metadata.get(ANSWER_ORDER, "label_first")


def reason_first(label: str, explanations: Sequence[str]) -> str:
    """Build a target: each explanation after a separator, then the label after its mark.

    Example:
        >>> reason_first("neutral", ["it may rain"])
        'explanation: it may rain label: neutral'
    """
    return f"{_joined(explanations)} {LABEL_MARK} {label}".strip()


def _joined(explanations: Sequence[str]) -> str:
    return "".join(SEPARATOR + text for text in explanations).strip()


def ordered(row: Example, order: Order, *, training: bool, explain: bool | None = None) -> Example:
    """Return an example with prompt and target in an order.

    With separate, the example is the label prompt, and the metadata field `AUXILIARY` has the example of the prompt for
    the explanation: in training where the row has an explanation, otherwise where `explain` asks for one.

    Args:
        row: Example of a task with explanations; others are returned unchanged.
        order: Order of label and explanation.
        training: True for an example of a training.
        explain: Whether an answer has an explanation; None for the default of the order.
    """
    foreign = bool(row.target) and "explain" not in row.metadata
    if order == "label_first" or foreign:
        return row
    asks = bool(row.metadata.get("explain", row.input.startswith(EXPLAIN)))
    if order == "reason_first":
        return _reasoned(row) if asks else row
    return _separated(row, wanted=asks and bool(row.metadata["explanations"]) if training else bool(explain))


def _reasoned(row: Example) -> Example:
    """Example whose target has the explanations before the label."""
    metadata: dict[str, Any] = {**row.metadata, ANSWER_ORDER: "reason_first"}
    if not row.target:
        return replace(row, metadata=metadata)
    reasons: Sequence[str] = metadata["explanations"]
    target = reason_first(metadata["label"], reasons)
    if PARTS in metadata:
        ends = [end for _, end in metadata[PARTS][1:]]
        begun = [_joined(reasons[: count + 1]) for count in range(len(reasons))]
        texts = [text[len(before) :] for before, text in zip(["", *begun], [*begun, target], strict=True)]
        metadata[PARTS] = tuple(zip(texts, [*ends, 0], strict=True))
    return _with_target(row, target, metadata)


def _separated(row: Example, *, wanted: bool) -> Example:
    """Example of the label prompt, with that of the prompt for the explanation if it is wanted."""
    asked = request_explanation(row, explain=False)
    metadata: dict[str, Any] = {**asked.metadata, "explain": False}
    parts = metadata.pop(PARTS, ())
    label = _with_target(asked, metadata["label"] if row.target else "", metadata)
    if not wanted:
        return label
    reason = request_explanation(row, explain=True)
    own: dict[str, Any] = {**reason.metadata, "explain": True, ANSWER_ORDER: "rationale"}
    target = ""
    if row.target:
        reasons: Sequence[str] = own["explanations"]
        target = SEPARATOR.join(reasons)
        if parts:
            first, *others = reasons
            ends = [end for _, end in parts[1:]]
            own[PARTS] = tuple(zip([first, *(SEPARATOR + text for text in others)], ends, strict=True))
    return replace(label, metadata={**label.metadata, AUXILIARY: _with_target(reason, target, own)})


def _with_target(row: Example, target: str, metadata: Mapping[str, Any]) -> Example:
    """Example with another target, which is also the last turn of a conversation."""
    own = dict(metadata)
    if "turns" in own and row.target:
        turns: Sequence[tuple[str, str]] = own["turns"]
        own["turns"] = (*turns[:-1], (turns[-1][0], target))
    return replace(row, target=target, metadata=own)


def combined(label: Mapping[str, Any], reason: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the answer to a label prompt with the explanations of the answer to the other prompt.

    Args:
        label: Answer to the label prompt: `prediction`, and `answer` if it was read from its tokens.
        reason: Answer to the prompt for the explanation.
    """
    text = str(reason["prediction"])
    found = {**label, "prediction": with_explanations(str(label["prediction"]), [text] if text else [])}
    if "answer" in label and "answer" in reason:
        found["answer"] = {**reason["answer"], "label": label["answer"]["label"]}
    return found
