"""Responses and event streams in the formats of OpenAI's chat and completion APIs."""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.core.files import to_json
from graftwork.errors import GraftworkError
from graftwork.serving.answer_stream import ClientDisconnectedError
from graftwork.serving.error_handlers import error_body, status_of, unexpected
from graftwork.serving.queued_request import Completion, Delta

if TYPE_CHECKING:
    from graftwork.methods.regrad.text.requests import TokenProbability
    from graftwork.serving.service import Service

logger = logging.getLogger(__name__)

Json = dict[str, Any]
_INCOMPLETE = "\ufffd"


@dataclass
class ResponseFormat(ABC):
    """Format of the response to one request.

    Args:
        service: Service that answers.
        logprobs: True if log-probabilities are requested.
        ignored: Parts of the request without effect.
        answers: Number of answers to each prompt, which are next to each other.
    """

    service: Service
    logprobs: bool
    ignored: Sequence[str]
    answers: int = 1

    prefix = ""
    """Prefix of the ids of responses."""
    kind = ""
    """Type of a whole response."""
    chunk_kind = ""
    """Type of a part of a stream."""

    def __post_init__(self) -> None:
        """Choose the id of the response."""
        self.head: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.service.name,
        }
        self._offsets: dict[int, int] = {}

    @abstractmethod
    def choice(self, index: int, completion: Completion) -> Json:
        """Return one answer of a whole response, without its index and reason to end."""

    @abstractmethod
    def part(self, text: str, probabilities: Json | None) -> Json:
        """Return one part of an answer in a stream, without its index and reason to end."""

    @abstractmethod
    def opening(self) -> Json | None:
        """Return the first part of every answer in a stream; None for none."""

    @abstractmethod
    def probabilities(self, index: int, found: Sequence[TokenProbability]) -> Json:
        """Return the log-probabilities of the next tokens of an answer."""

    def whole(self, completions: Sequence[Completion]) -> Json:
        """Return a response in one piece."""
        choices = [
            {"index": index, **self.choice(index, one), "finish_reason": _reason(one)}
            for index, one in enumerate(completions)
        ]
        regrad = self.record(completions)
        return {
            **self.head,
            "object": self.kind,
            "choices": choices,
            "usage": self._usage(completions),
            "regrad": regrad,
        }

    async def events(
        self,
        first: tuple[int, Delta | Completion],
        events: AsyncGenerator[tuple[int, Delta | Completion]],
        count: int,
        with_usage: bool,
    ) -> AsyncGenerator[str]:
        """Yield server-sent events: parts as they arrive, token counts, and the end of the stream.

        Args:
            first: First event; errors before it are responses of their own.
            events: Remaining events.
            count: Number of answers.
            with_usage: Send token counts at the end.
        """
        base: Json = {**self.head, "object": self.chunk_kind, **({"usage": None} if with_usage else {})}
        completions: dict[int, Completion] = {}

        def chunk(index: int, part: Json, reason: str | None = None, **more: Any) -> str:
            choice = {"index": index, **part, "finish_reason": reason}
            return _event({**base, "choices": [choice], **more})

        def parts(index: int, event: Delta | Completion) -> str:
            if isinstance(event, Delta):
                found = self.probabilities(index, event.probabilities) if self.logprobs else None
                return chunk(index, self.part(event.text, found))
            completions[index] = event
            return chunk(index, self.part("", None), _reason(event), regrad=self.record([event]))

        try:
            opening = self.opening()
            for index in range(count if opening is not None else 0):
                yield chunk(index, opening or {})
            yield parts(*first)
            async for index, event in events:
                yield parts(index, event)
            if with_usage:
                usage = self._usage([completions[index] for index in range(count)])
                yield _event({**base, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except ClientDisconnectedError:
            return
        except GraftworkError as error:
            # the status was sent with the first event
            yield _event(error_body(status_of(error), " ".join(str(error).split()), type(error).__name__))
        except Exception as error:
            logger.exception("An answer failed in the middle of its stream.")
            yield _event(error_body(500, unexpected(error), "ServerError"))
        finally:
            await events.aclose()

    def record(self, completions: Sequence[Completion]) -> Json:
        """Return the measurements of the first answer, and the seeds of all."""
        seeds = [one.answer.seed for one in completions if one.answer.seed is not None]
        several: Json = {"seeds": seeds} if len(seeds) > 1 else {}
        return {**self.service.record(completions[0]), "ignored": list(self.ignored), **several}

    def _usage(self, completions: Sequence[Completion]) -> Json:
        """Token counts; answers to one prompt share it."""
        prompt = sum(one.prompt_tokens for one in completions[:: self.answers])
        new = sum(one.answer.tokens for one in completions)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def text_of(self, token: int) -> str:
        """Return the text of a token."""
        return self.service.answerer.prompts.token_text(token)


class ChatFormat(ResponseFormat):
    """Format of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, completion: Completion) -> Json:
        """Return the answer as a message."""
        found = self.probabilities(index, completion.answer.probabilities) if self.logprobs else None
        return {"message": {"role": "assistant", "content": completion.answer.text}, "logprobs": found}

    def part(self, text: str, probabilities: Json | None) -> Json:
        """Return a part as a delta; an empty one ends the answer."""
        delta = {"content": text} if text or probabilities else {}
        return {"delta": delta, "logprobs": probabilities}

    def opening(self) -> Json | None:
        """Return the role of the answer."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def probabilities(self, index: int, found: Sequence[TokenProbability]) -> Json:
        """Return one entry for each token."""
        content = [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*other) for other in one.top]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self.text_of(token)
        data = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


class CompletionFormat(ResponseFormat):
    """Format of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, completion: Completion) -> Json:
        """Return the continuation as text."""
        found = self.probabilities(index, completion.answer.probabilities) if self.logprobs else None
        return {"text": completion.answer.text, "logprobs": found}

    def part(self, text: str, probabilities: Json | None) -> Json:
        """Return a part as text."""
        return {"text": text, "logprobs": probabilities}

    def opening(self) -> Json | None:
        """Return None: continuations have no role."""
        return None

    def probabilities(self, index: int, found: Sequence[TokenProbability]) -> Json:
        """Return lists with one entry for each token."""
        tokens = [self.text_of(one.token) for one in found]
        offsets: list[int] = []
        for text in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": [{self.text_of(token): _finite(value) for token, value in one.top} for one in found],
            "text_offset": offsets,
        }


def _reason(completion: Completion) -> str:
    return "stop" if completion.complete else "length"


def _finite(logprob: float) -> float:
    """A log-probability as JSON; −9999 for minus infinity, as in OpenAI's API."""
    return max(logprob, -9999.0)


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {to_json(content)}\n\n"
