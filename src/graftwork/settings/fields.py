"""Settings that map the columns of a user's own files to inputs, targets and labels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from graftwork.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataFields:
    """Mapping of the columns of own data; without any, the format is recognised from the content."""

    input_field: str | None = None
    """Own data: column with the input text. Dots lead into nested fields: data.question. Without any field the format
    is recognised from the content, and the guess is printed."""
    target_field: tuple[str, ...] | str = ()
    """Own data: column with the answer, or with a list of accepted answers; repeat for several references. The first
    answer is the target of training, and scores take the best one."""
    label_field: str | None = None
    """Own data: column with a class, in place of target_field. It makes a classification task, whose classes are the
    distinct values."""
    text_field: str | None = None
    """Own explained data: column with the text that is classified and explained, in place of input_field; needs
    label_field, and explanation_field, spans_field, teacher_field or teacher_outputs."""
    explanation_field: tuple[str, ...] | str = ()
    """Own explained data: column with an explanation in free text; repeat for several. Rows without one are trained
    with their label alone."""
    spans_field: str | None = None
    """Own explained data: column with the words of the text that explain the label: a quote or a JSON list of quotes,
    of [start, end] in characters, or of 0 and 1 for each token (several lists: one of each annotator)."""
    teacher_field: str | None = None
    """Own explained data: column with outputs of a language model, one text or a list: a reason, then the label after
    "So the answer is", "The answer is" or "Answer:". Reasons are kept if their label is that of the row."""
    teacher_outputs: tuple[str, ...] | str = ()
    """Own explained data: files with such outputs: JSON lists of texts, one for each row in order, or rows with id and
    output, several for each id; repeat for several files."""
    labels: tuple[str, ...] = ()
    """Own explained data: the labels in their order; by default the distinct values of label_field."""
    pair_field: str | None = None
    """Own data: column with a second text, for tasks on pairs of texts."""
    context_field: str | None = None
    """Own data: column with a passage. The input becomes "question: … context: …", as in T5; use input_template for
    another wording."""
    choices_field: str | None = None
    """Own data: column with a list of options. They follow the input as "(A) … (B) …", a target may be a letter or a
    position, and the nearest option is scored. Explained data: the options are the labels of their row."""
    messages_field: str | None = None
    """Own data: column with a conversation, a list of turns with role and content, or from and value. It is formatted
    with the model's chat template, and only assistant turns have a loss."""
    input_template: str | None = None
    r"""Own data: text of the input with column names in braces, such as "Q: {question}\nA:", in place of input_field.
    Write {{ and }} for braces, \n for a line feed."""
    target_template: str | None = None
    """Own data: text of the target with column names in braces, in place of target_field."""
    as_chat: bool = False
    """Own data: use the model's chat template with the input as user turn and the target as assistant turn. Choose it
    for instruction-tuned models."""
    chat_template: str | None = None
    """Own data: file with a Jinja chat template, for tokenizers without one or in place of theirs; training saves it
    with the model."""

    def __post_init__(self) -> None:
        """Validate the combination of fields.

        Raises:
            ConfigError: If two fields exclude each other, or one has no effect.
        """
        object.__setattr__(self, "target_field", self.targets)
        object.__setattr__(self, "explanation_field", self.explanations_of)
        given = self.teacher_outputs
        object.__setattr__(self, "teacher_outputs", (given,) if isinstance(given, str) else given)
        exclusive = (
            ("input_field", "input_template"),
            ("target_field", "target_template"),
            ("target_field", "label_field"),
            ("target_template", "label_field"),
            *((("choices_field", "label_field"),) if self.text_field is None else ()),
            ("choices_field", "labels"),
            ("context_field", "input_template"),
            ("pair_field", "input_template"),
            ("pair_field", "context_field"),
            *combinations(("explanation_field", "spans_field", "teacher_field", "teacher_outputs"), 2),
            *((("as_chat", "label_field"),) if self.text_field is None else ()),
            *(("text_field", name) for name in MAPPED if name not in EXPLAINED),
            *(("messages_field", name) for name in MAPPED if name != "messages_field"),
        )
        for first, second in exclusive:
            if getattr(self, first) and getattr(self, second):
                raise ConfigError(
                    f"Found {first} ({getattr(self, first)}) and {second} ({getattr(self, second)}), which exclude "
                    f"each other{_advice(first, second)}. Give one of the two."
                )
        self._check_explained()
        if self.mapped and not (self.text_field or self.input_field or self.input_template or self.messages_field):
            given = next(name for name in MAPPED if getattr(self, name))
            raise ConfigError(
                f"Found {given} without an input. Expected also input_field or input_template; give the column of "
                "the input."
            )

    def _check_explained(self) -> None:
        """Check that a text, a label and an explanation are named together."""
        given = [name for name in (*REASONS, "labels") if getattr(self, name)]
        if given and self.text_field is None:
            raise ConfigError(
                f"Found {given[0]} without text_field. Expected the column of the text that is explained; name it with "
                "text_field, in place of input_field."
            )
        if self.text_field is None:
            return
        if not self.label_field or not any(getattr(self, name) for name in REASONS):
            raise ConfigError(
                f"Found text_field ({self.text_field}) without "
                f"{'label_field' if not self.label_field else 'explanation_field or spans_field'}. Expected a text, a "
                "label and an explanation; name all three columns, or use input_field for data without explanations."
            )

    @property
    def explanations_of(self) -> tuple[str, ...]:
        """Columns of `explanation_field`."""
        own = self.explanation_field
        return (own,) if isinstance(own, str) else own

    @property
    def mapped(self) -> bool:
        """True if any column is named, so that nothing is recognised from the content."""
        return any(getattr(self, name) for name in MAPPED)

    @property
    def targets(self) -> tuple[str, ...]:
        """Columns of `target_field`."""
        return (self.target_field,) if isinstance(self.target_field, str) else self.target_field

    @property
    def given(self) -> dict[str, Any]:
        """Fields that differ from their defaults."""
        return {entry.name: value for entry in fields(DataFields) if (value := getattr(self, entry.name))}

    def only_fields(self) -> DataFields:
        """Return the mapping alone, if this is a larger configuration."""
        return DataFields(**self.given)


REASONS = ("explanation_field", "spans_field", "teacher_field", "teacher_outputs")
"""Settings that name the explanations of explained data, of which one is given."""
EXPLAINED = ("text_field", "label_field", "choices_field", *REASONS)
"""Settings that name the columns of explained data."""
MAPPED = (
    "text_field",
    *REASONS,
    "input_field",
    "target_field",
    "label_field",
    "pair_field",
    "context_field",
    "choices_field",
    "messages_field",
    "input_template",
    "target_template",
)
"""Settings that name columns."""


def _advice(first: str, second: str) -> str:
    if second == "input_template" and first != "input_field":
        return ": write the column in braces into the template"
    return ""
