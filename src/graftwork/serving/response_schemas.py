"""Response bodies in the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class UsedPassage(BaseModel):
    """A passage whose gradient was part of the answer's update, or that was part of the prompt."""

    id: str
    document: str
    title: str
    score: float | None
    rank: int


class Fingerprint(BaseModel):
    """Digests of the model and of the bank's ids when the question was answered."""

    model: str
    bank: str | None


class AnswerRecord(BaseModel):
    """Passages, measurements and fingerprints of an answer."""

    passages: list[UsedPassage]
    missing: list[str] = Field(description="Ids of retrieved passages without a gradient.")
    update_norm: float | None = Field(description="Length of the gradient step; null if it is not finite.")
    tokens: int
    seconds: dict[str, float]
    fingerprint: Fingerprint
    seed: int | None = Field(None, description="Sampling seed; left out of greedy answers.")


class AnswerBody(AnswerRecord):
    """An answer."""

    answer: str


class AddedBody(BaseModel):
    """Numbers of added passages."""

    written: int = Field(description="New gradients.")
    aliased: int = Field(description="New ids of gradients that existed.")
    skipped: int = Field(description="Ids that existed with the same text.")
    replaced: int
    indexed: bool = Field(description="True if the passages were added to the index as well.")


class Searched(BaseModel):
    """Bytes that were searched for and not found."""

    kind: str = Field(description="Origin of the bytes: gradient, key or text.")
    bytes: int
    sha256: str


class ErasureBody(BaseModel):
    """Record of an erasure, which the bank stores as well."""

    time: str
    ids: list[str] = Field(description="SHA-256 of the id.")
    shared: list[str] = Field(description="The same id if another passage has its text, which then stays in the files.")
    searched: list[Searched]
    files: int
    bytes: int
    ids_left: int = Field(description="Number of ids in the bank afterwards, all verified.")
    index: bool = Field(description="True if the passage was erased from the index as well.")


class DeletedBody(BaseModel):
    """Id of the deleted passage."""

    deleted: str
    erasure: ErasureBody | None = Field(default=None, description="Only with `erase`.")


class StatsBody(BaseModel):
    """Size of the bank."""

    ids: int
    records: int
    precision: str
    numbers: int
    bytes_per_record: int
    bytes: int
    batches: int
    fingerprint: Fingerprint


class ReplyMessage(BaseModel):
    """The answer as a turn of the conversation."""

    role: Literal["assistant"]
    content: str


class TokenAlternative(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8 bytes; null for a part of a character.")


class TokenLogprob(TokenAlternative):
    """A token of the answer, with the most likely tokens in its place."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities of all tokens of an answer, before temperature and top_p."""

    content: list[TokenLogprob]
    refusal: None


class Choice(BaseModel):
    """One answer of a chat response."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of all tokens of a continuation, before temperature and top_p."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Position of each token in the text of all tokens.")


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatRecord(AnswerRecord):
    """The record of the first answer."""

    ignored: list[str] = Field(description="Parts of the request without effect.")
    seeds: list[int] = Field([], description="Sampling seeds of all answers, if there are several.")


class ChatBody(BaseModel):
    """A response of the chat API."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    regrad: ChatRecord


class CompletionBody(BaseModel):
    """A response of the completion API."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    regrad: ChatRecord


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsBody(BaseModel):
    """Models of the server."""

    object: Literal["list"]
    data: list[Model]


class HealthBody(BaseModel):
    """State of a server that answers."""

    status: Literal["ok"]
    waiting: int = Field(description="Number of questions in the queue.")


class UnhealthyBody(BaseModel):
    """State of a server that does not answer."""

    status: Literal["unhealthy"]
    found: str | None = Field(description="Reason for which questions are rejected.")


class ErrorDetail(BaseModel):
    """Message, type and status of an error."""

    message: str
    type: str
    code: int


class ErrorBody(BaseModel):
    """Body of every response that is no success, in the shape of OpenAI's API."""

    error: ErrorDetail
