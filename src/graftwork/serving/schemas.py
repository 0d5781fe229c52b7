"""Request bodies: fields are validated one by one, and unknown fields are rejected."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from graftwork.methods.regrad.text.sampling import SEEDS
from graftwork.tasks.multihop import Kind

Identifier = Annotated[str, Field(min_length=1, max_length=512)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AnswerOptions(_Strict):
    """Options of an answer; fields that are left out take the model's settings."""

    passage_ids: list[Identifier] | None = Field(
        None, description="Ids of the passages to use; an empty list for none. Left out, passages are retrieved."
    )
    top_k: int | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("top_k", "topk"),
        description="Maximum number of passages to retrieve.",
    )
    strength: float | None = Field(
        None,
        validation_alias=AliasChoices("strength", "gamma"),
        description="Factor of the gradient step; 0 answers with the trained adapter alone.",
    )
    blind: bool | None = Field(None, description="False puts the passages into the prompt as well.")
    adapter: bool | None = Field(None, description="False answers with the pretrained model.")
    temperature: float | None = Field(
        None, ge=0, description="Sampling temperature; 0 takes the most likely token (greedy decoding)."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the smallest set of tokens with this total probability."
    )
    seed: int | None = Field(
        None, ge=0, lt=SEEDS, description="Sampling seed; the same seed gives the same answer. Left out, it is random."
    )
    kind: Kind = Field("open", description="Kind of question: open, yes_no or choice.")
    choices: list[str] = Field([], max_length=5, description="The five options of a question of kind choice.")


class AnswerRequest(AnswerOptions):
    """A question with its options."""

    question: str = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1, description="Maximum number of new tokens.")


class NewPassage(_Strict):
    """A passage to add."""

    id: Identifier
    text: str = Field(min_length=1)
    title: str = ""


class AddPassagesRequest(_Strict):
    """Passages to add in one request."""

    passages: list[NewPassage] = Field(min_length=1)
    replace: bool = Field(False, description="Replace passages whose id exists with another text.")


class _Lenient(BaseModel):
    """Base of bodies with unknown fields; those without effect are listed in `regrad.ignored` of the answer."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class ContentPart(_Lenient):
    """A part of a message, such as text or an image."""

    type: str
    text: str = ""


class Message(_Lenient):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None

    def plain_text(self) -> str:
        """Return the text of the turn."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""

    def non_text_parts(self) -> list[int]:
        """Return the positions of parts that are no text, such as images."""
        parts = self.content if isinstance(self.content, list) else []
        return [number for number, part in enumerate(parts) if part.type != "text"]


class ChatRequest(_Lenient):
    """A conversation in the format of OpenAI's chat API."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    regrad: AnswerOptions = Field(default_factory=lambda: AnswerOptions.model_validate({}))
