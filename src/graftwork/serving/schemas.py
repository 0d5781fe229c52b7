"""Request bodies: fields are validated one by one, and unknown fields are rejected."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from graftwork.serving.texts import Identifier, NonBlankText, Text, check_value
from graftwork.tasks.multihop import Kind

MAX_STRENGTH = 100.0
"""Largest magnitude of the factor of the gradient step."""
MAX_NUMBER = 1 << 31
"""Bound of counts; the server's own limits are far below."""
MAX_SEED = (1 << 53) - 1
"""Largest seed: larger numbers of JSON are rounded by clients that read them as floating-point numbers."""
_CHOICES = 5


def _whole(value: Any) -> Any:
    """An integer for a whole number with a fraction of zero, such as 5.0, which JSON does not distinguish from 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# literals compare by value, and in Python 0 equals false and 1 equals true
def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return _whole(value)


def _check_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"expected 0, or a number from {MIN_TEMPERATURE:g}")
    return value


MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 100.0
"""Range of sampling temperatures above 0."""
Temperature = Annotated[
    float,
    Field(ge=0, le=MAX_TEMPERATURE),
    AfterValidator(_check_temperature),
    WithJsonSchema(
        {"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": MAX_TEMPERATURE}]}
    ),
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, lt=MAX_NUMBER), BeforeValidator(_whole)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AnswerOptions(_Strict):
    """Options of an answer; fields that are left out take the model's settings."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"kind": {"const": "choice"}}, "required": ["kind"]},
            "then": {"properties": {"choices": {"minItems": _CHOICES}}, "required": ["choices"]},
            "else": {"properties": {"choices": {"maxItems": 0}}},
        }
    )

    passage_ids: list[Identifier] | None = Field(
        None, description="Ids of the passages to use; an empty list for none. Left out, passages are retrieved."
    )
    top_k: Annotated[int, Field(ge=0, lt=MAX_NUMBER), BeforeValidator(_whole)] | None = Field(
        None,
        validation_alias=AliasChoices("top_k", "topk"),
        description="Maximum number of passages to retrieve.",
    )
    strength: float | None = Field(
        None,
        ge=-MAX_STRENGTH,
        le=MAX_STRENGTH,
        validation_alias=AliasChoices("strength", "gamma"),
        description="Factor of the gradient step; 0 answers with the trained adapter alone.",
    )
    blind: bool | None = Field(None, description="False puts the passages into the prompt as well.")
    adapter: bool | None = Field(None, description="False answers with the pretrained model.")
    temperature: Temperature | None = Field(
        None, description="Sampling temperature; 0 takes the most likely token (greedy decoding)."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the smallest set of tokens with this total probability."
    )
    seed: Seed | None = Field(
        None, description="Sampling seed; the same seed gives the same answer. Left out, it is random."
    )
    kind: Kind = Field("open", description="Kind of question: open, yes_no or choice.")
    choices: list[Text] = Field([], max_length=_CHOICES, description="The five options of a question of kind choice.")

    @model_validator(mode="after")
    def check_choices(self) -> Self:
        """Check that a question of kind choice has five options, and every other one none."""
        expected = _CHOICES if self.kind == "choice" else 0
        if len(self.choices) != expected:
            raise ValueError(
                f"found {len(self.choices)} choices in a question of kind {self.kind}; expected {expected}"
            )
        return self


class AnswerRequest(AnswerOptions):
    """A question with its options."""

    question: NonBlankText
    max_new_tokens: Count | None = Field(None, description="Maximum number of new tokens.")


class NewPassage(_Strict):
    """A passage to add."""

    id: Identifier
    text: NonBlankText
    title: Text = ""


class AddPassagesRequest(_Strict):
    """Passages to add in one request."""

    passages: list[NewPassage] = Field(min_length=1)
    replace: bool = Field(False, description="Replace passages whose id exists with another text.")


class _Lenient(BaseModel):
    """Base of bodies with unknown fields; those without effect are listed in `regrad.ignored` of the answer."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def check_extra(self) -> Self:
        """Check the texts of unknown fields, whose names are part of the answer."""
        check_value(self.model_extra or {})
        return self


class ContentPart(_Lenient):
    """A part of a message, such as text or an image."""

    type: Text
    text: Text = ""


class Message(_Lenient):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None

    def plain_text(self) -> str:
        """Return the text of the turn."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""

    def non_text_parts(self) -> list[int]:
        """Return the positions of parts that are no text, such as images."""
        parts = self.content if isinstance(self.content, list) else []
        return [number for number, part in enumerate(parts) if part.type != "text"]


class _Generation(_Lenient):
    """Fields that OpenAI's chat and completion APIs share."""

    model: Text
    max_tokens: Count | None = None
    n: Count | None = Field(None, description="Number of answers; further ones differ with a temperature only.")
    stream: bool = Field(False, description="Send the answer in parts, as server-sent events.")
    stream_options: dict[str, Any] | None = None
    stop: Text | list[Text] | None = Field(None, description="Sequences that end the answer.")
    temperature: Temperature | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Seed | None = None
    regrad: AnswerOptions = Field(default_factory=lambda: AnswerOptions.model_validate({}))

    def stop_sequences(self) -> list[str]:
        """Return the stop sequences; empty ones have no effect."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [one for one in found if one]

    @property
    def with_usage(self) -> bool:
        """True if a stream ends with token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(_Generation):
    """A conversation in the format of OpenAI's chat API."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = Field(None, description="Return the log-probability of every token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)] | None = Field(
        None, description="Number of most likely tokens to return in place of each token; needs `logprobs`."
    )

    @model_validator(mode="after")
    def check_logprobs(self) -> Self:
        """Check that alternatives are requested together with log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("found top_logprobs without logprobs; expected logprobs to be true")
        return self


class CompletionRequest(_Generation):
    """A prompt in the format of OpenAI's completion API."""

    prompt: NonBlankText | Annotated[list[NonBlankText], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5), BeforeValidator(_whole)] | None = Field(
        None, description="Return the log-probability of every token and of this many most likely ones."
    )
    echo: Annotated[Literal[False], BeforeValidator(_boolean)] | None = None
    best_of: Annotated[Literal[1], BeforeValidator(_number)] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str]:
        """Return all prompts of the request."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
