"""Requests and answers as JSON: what is read is checked field by field, and unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from graftwork.methods.regrad.text.sampling import SEEDS
from graftwork.tasks.multihop import Kind

Identifier = Annotated[str, Field(min_length=1, max_length=512)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AnswerOptions(_Strict):
    """How a question is answered; what is left out is as the model's settings say."""

    passage_ids: list[Identifier] | None = Field(
        None, description="Passages to recall; an empty list for none. Left out, they are retrieved."
    )
    top_k: int | None = Field(
        None, ge=0, validation_alias=AliasChoices("top_k", "topk"), description="Passages to retrieve at most."
    )
    strength: float | None = Field(
        None,
        validation_alias=AliasChoices("strength", "gamma"),
        description="How far the step goes; 0 answers with the adapter as it was learned.",
    )
    blind: bool | None = Field(None, description="Off shows the passages in the prompt as well.")
    adapter: bool | None = Field(None, description="Off answers with the pretrained model.")
    temperature: float | None = Field(None, ge=0, description="Draw tokens at this temperature; 0 takes the likeliest.")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw among the likeliest tokens of this probability.")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="Draw the same again; left out, another one each time.")
    kind: Kind = Field("open", description="How the answer is worded: open, yes_no or choice.")
    choices: list[str] = Field([], max_length=5, description="The five candidates of a choice.")


class AnswerRequest(AnswerOptions):
    """A question."""

    question: str = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1, description="Tokens generated at most.")


class NewPassage(_Strict):
    """A passage to add."""

    id: Identifier
    text: str = Field(min_length=1)
    title: str = ""


class AddPassagesRequest(_Strict):
    """Passages to add together."""

    passages: list[NewPassage] = Field(min_length=1)
    replace: bool = Field(False, description="Let an id that is there stand for its new text.")


class _Lenient(BaseModel):
    """Clients send many fields that mean nothing here; which ones is said in the answer."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class ContentPart(_Lenient):
    """A part of a message."""

    type: str
    text: str = ""


class Message(_Lenient):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None

    def plain_text(self) -> str:
        """The text of the turn."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.type == "text")
        return self.content or ""

    def non_text_parts(self) -> list[int]:
        """Parts of the turn that are no text, such as pictures."""
        parts = self.content if isinstance(self.content, list) else []
        return [number for number, part in enumerate(parts) if part.type != "text"]


class ChatRequest(_Lenient):
    """A conversation as OpenAI's clients send it."""

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
    regrad: AnswerOptions = AnswerOptions()  # type: ignore[call-arg]
