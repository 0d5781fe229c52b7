"""Endpoints of OpenAI's chat and completion APIs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from graftwork.errors import ConfigError
from graftwork.methods.regrad.text.requests import Question
from graftwork.serving.answer_stream import DisconnectWaiter
from graftwork.serving.error_handlers import responses
from graftwork.serving.openai_format import ChatFormat, CompletionFormat, ResponseFormat
from graftwork.serving.response_schemas import ChatBody, CompletionBody, Model, ModelsBody
from graftwork.serving.schemas import ChatRequest, CompletionRequest
from graftwork.serving.service import Service
from graftwork.serving.tenants import service_of
from graftwork.serving.texts import Text

_SAMPLING = ("temperature", "top_p", "seed")
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers that keep proxies from collecting the parts of a stream."""


def add_chat(app: FastAPI, service: Service, wait_for_disconnect: Callable[[Request], DisconnectWaiter]) -> None:
    """Add `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/v1/models/{id}`."""
    description = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "graftwork"}

    def check_name(name: str) -> None:
        if name != service.name:
            raise HTTPException(404, f"Found model {name!r}; expected {service.name!r}.")

    async def models() -> dict[str, Any]:
        """List the model of this server."""
        return {"object": "list", "data": [description]}

    async def model(id: Text) -> dict[str, Any]:
        """Describe the model of this server."""
        check_name(id)
        return description

    async def respond(
        asked: ChatRequest | CompletionRequest,
        questions: Sequence[Question],
        form: ResponseFormat,
        limit: int | None,
        request: Request,
    ) -> dict[str, Any] | StreamingResponse:
        """Answer questions in one piece or as a stream."""
        own = form.service
        if limit is not None:
            # clients send limits far above the length of an answer: lowered, not rejected
            limit = min(limit, own.settings.max_new_tokens)
        alternatives = int(asked.top_logprobs or 0) if isinstance(asked, ChatRequest) else asked.logprobs
        options: dict[str, Any] = {
            "max_new_tokens": limit,
            "stop": asked.stop_sequences(),
            "top": alternatives if form.logprobs else None,
            "disconnected": wait_for_disconnect(request),
        }
        if not asked.stream:
            return form.whole(await own.answer(questions, **options))
        events = own.stream(questions, **options)
        # errors before the first part are ordinary responses
        first = await anext(events)
        parts = form.events(first, events, len(questions), asked.with_usage)
        return StreamingResponse(parts, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def chat(chat: ChatRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        """Answer the last question of a conversation; passages are retrieved for the last message."""
        check_name(chat.model)
        own = service_of(request)
        text, system, history, ignored = _conversation(chat)
        question = own.question(text, **_options(chat), system=system, history=history)
        count = chat.n or 1
        form = ChatFormat(own, bool(chat.logprobs), ignored, count)
        limit = chat.max_completion_tokens or chat.max_tokens
        return await respond(chat, own.repeated(question, count), form, limit, request)

    async def complete(completion: CompletionRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        """Continue a text, after one gradient step on the passages that are retrieved for it."""
        check_name(completion.model)
        own = service_of(request)
        count = completion.n or 1
        own.check_choices(count * len(completion.prompts()))
        options = _options(completion)
        questions = [own.question(text, **options, verbatim=True) for text in completion.prompts()]
        form = CompletionFormat(own, completion.logprobs is not None, list(completion.model_extra or {}), count)
        asked = [one for question in questions for one in own.repeated(question, count)]
        return await respond(completion, asked, form, completion.max_tokens, request)

    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None, responses=responses(ModelsBody, 500))
    app.add_api_route(
        "/v1/models/{id}", model, methods=["GET"], response_model=None, responses=responses(Model, 404, 422, 500)
    )
    # the schema of an event stream is that of one event
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    for path, endpoint, body in (
        ("/v1/chat/completions", chat, ChatBody),
        ("/v1/completions", complete, CompletionBody),
    ):
        completing = responses(body, 404, 408, 422, 429, 500, 503, 504)
        completing[200]["content"] = {"text/event-stream": {"schema": event}}
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None, responses=completing)


def _options(asked: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """Options of the answer; those of `regrad` have priority."""
    options = asked.regrad.model_dump()
    return {**options, **{name: getattr(asked, name) for name in _SAMPLING if options[name] is None}}


def _conversation(chat: ChatRequest) -> tuple[str, str | None, list[tuple[str, str]], list[str]]:
    """The question, the system prompt, the earlier turns, and the parts of the request without effect."""
    last = chat.messages[-1]
    if last.role != "user":
        raise ConfigError(f"Found a conversation that ends with the role {last.role}; expected a question of the user.")
    system: list[str] = []
    history: list[tuple[str, str]] = []
    ignored: list[str] = []
    for number, message in enumerate(chat.messages):
        ignored += [f"messages.{number}.content.{part}" for part in message.non_text_parts()]
        text = message.plain_text()
        if message is last:
            break
        if message.role == "tool" or not text.strip():
            ignored.append(f"messages.{number}")
        elif message.role in ("system", "developer"):
            system.append(text)
        else:
            history.append((message.role, text))
    unknown = list(chat.model_extra or {})
    return last.plain_text(), "\n\n".join(system) or None, history, ignored + unknown
