"""Endpoints of OpenAI's chat API; only the last message is answered, earlier turns are ignored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from graftwork.core.files import to_json
from graftwork.errors import ConfigError
from graftwork.serving.error_handlers import responses
from graftwork.serving.response_schemas import ChatBody, Model, ModelsBody
from graftwork.serving.schemas import ChatRequest
from graftwork.serving.service import DisconnectWaiter, Service
from graftwork.serving.texts import Text

_USED = ("model", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop", "regrad")
_SAMPLING = ("temperature", "top_p", "seed")


def add_chat(app: FastAPI, service: Service, wait_for_disconnect: Callable[[Request], DisconnectWaiter]) -> None:
    """Add `/v1/chat/completions`, `/v1/models` and `/v1/models/{id}`."""
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

    async def complete(chat: ChatRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        """Answer the last question of a conversation; `regrad.ignored` lists parts of the request without effect."""
        check_name(chat.model)
        text, ignored = _question_of(chat)
        options = chat.regrad.model_dump()
        sampling = {name: getattr(chat, name) for name in _SAMPLING if options[name] is None}
        question = service.question(text, **{**options, **sampling})
        limit = chat.max_completion_tokens or chat.max_tokens
        if limit is not None:
            # clients send limits far above the length of an answer: lowered, not rejected
            limit = min(limit, service.settings.max_new_tokens)
        completions = await service.answer([question], max_new_tokens=limit, disconnected=wait_for_disconnect(request))
        completion = completions[0]
        answer, stopped = _cut_at_stop(completion.answer.text, chat.stop)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        usage = {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.answer.tokens,
            "total_tokens": completion.prompt_tokens + completion.answer.tokens,
        }
        reason = "stop" if stopped or completion.complete else "length"
        extra = {**service.record(completion), "ignored": ignored}
        if chat.stream:
            with_usage = bool((chat.stream_options or {}).get("include_usage"))
            events = _events(head, answer, reason, extra, usage if with_usage else None)
            return StreamingResponse(events, media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage, "regrad": extra}

    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None, responses=responses(ModelsBody, 500))
    app.add_api_route(
        "/v1/models/{id}", model, methods=["GET"], response_model=None, responses=responses(Model, 404, 422, 500)
    )
    completing = responses(ChatBody, 404, 408, 422, 429, 500, 503, 504)
    # the schema of an event stream is that of one event
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    completing[200]["content"] = {"text/event-stream": {"schema": event}}
    app.add_api_route(
        "/v1/chat/completions",
        complete,
        methods=["POST"],
        response_model=None,
        responses=completing,
    )


def _question_of(chat: ChatRequest) -> tuple[str, list[str]]:
    """The question, and the parts of the request that have no effect on its answer."""
    last = chat.messages[-1]
    if last.role != "user":
        raise ConfigError(f"Found a conversation that ends with the role {last.role}; expected a question of the user.")
    ignored = [f"messages.{number}" for number in range(len(chat.messages) - 1)]
    ignored += [f"messages.{len(chat.messages) - 1}.content.{number}" for number in last.non_text_parts()]
    return last.plain_text(), ignored + [name for name in (chat.model_extra or {}) if name not in _USED]


def _cut_at_stop(text: str, stop: str | list[str] | None) -> tuple[str, bool]:
    """The text before the first stop sequence, and True if there was one."""
    sequences = [stop] if isinstance(stop, str) else stop or []
    ends = [text.find(sequence) for sequence in sequences if sequence and sequence in text]
    return (text[: min(ends)], True) if ends else (text, False)


def _events(
    head: dict[str, Any], answer: str, reason: str, regrad: dict[str, Any], usage: dict[str, int] | None
) -> Generator[str]:
    """Server-sent events with the whole answer in one chunk; a batch returns complete answers only."""
    base = {**head, "object": "chat.completion.chunk"}
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": answer}, None), ({}, reason)]
    for delta, finish in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        extra = {"regrad": regrad} if finish else {}
        yield f"data: {to_json({**base, 'choices': [choice], **extra})}\n\n"
    if usage is not None:
        yield f"data: {to_json({**base, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
