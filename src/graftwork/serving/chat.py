"""The endpoint that OpenAI's clients know: every question stands by itself, the last of the conversation."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from graftwork.errors import ConfigError
from graftwork.serving.service import DisconnectWaiter, Service

_USED = ("model", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop", "regrad")
_SAMPLING = ("temperature", "top_p", "seed")


def add_chat(app: FastAPI, service: Service, wait_for_disconnect: Callable[[Request], DisconnectWaiter]) -> None:
    """Add `/v1/chat/completions` and `/v1/models`."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that there is."""
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "graftwork"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(chat: ChatRequest, request: Request) -> dict[str, Any] | StreamingResponse:
        """Answer the last question of a conversation; `regrad.ignored` names what had no effect."""
        if chat.model != service.name:
            raise HTTPException(404, f"Found model {chat.model!r}; expected {service.name!r}.")
        text, ignored = _asked(chat)
        options = chat.regrad.model_dump()
        drawn = {name: getattr(chat, name) for name in _SAMPLING if options[name] is None}
        question = service.question(text, **{**options, **drawn})
        limit = chat.max_completion_tokens or chat.max_tokens
        if limit is not None:
            # clients ask for far more than an answer needs
            limit = min(limit, service.settings.max_new_tokens)
        served = (await service.answer([question], max_new_tokens=limit, gone=wait_for_disconnect(request)))[0]
        words, stopped = _until(served.answer.text, chat.stop)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        usage = {
            "prompt_tokens": served.prompt_tokens,
            "completion_tokens": served.answer.tokens,
            "total_tokens": served.prompt_tokens + served.answer.tokens,
        }
        reason = "stop" if stopped or served.complete else "length"
        own = {**service.record(served), "ignored": ignored}
        if chat.stream:
            with_usage = bool((chat.stream_options or {}).get("include_usage"))
            events = _events(head, words, reason, own, usage if with_usage else None)
            return StreamingResponse(events, media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage, "regrad": own}


def _asked(chat: ChatRequest) -> tuple[str, list[str]]:
    """The question, and what of the request has no effect on its answer."""
    last = chat.messages[-1]
    if last.role != "user":
        raise ConfigError(f"Found a conversation that ends with the role {last.role}; expected a question of the user.")
    ignored = [f"messages.{number}" for number in range(len(chat.messages) - 1)]
    ignored += [f"messages.{len(chat.messages) - 1}.content.{number}" for number in last.non_text_parts()]
    return last.plain_text(), ignored + [name for name in (chat.model_extra or {}) if name not in _USED]


def _until(text: str, stop: str | list[str] | None) -> tuple[str, bool]:
    """The text before the first word that stops it."""
    words = [stop] if isinstance(stop, str) else stop or []
    ends = [text.find(word) for word in words if word and word in text]
    return (text[: min(ends)], True) if ends else (text, False)


def _events(
    head: dict[str, Any], words: str, reason: str, own: dict[str, Any], usage: dict[str, int] | None
) -> Iterator[str]:
    """The answer as one piece of a stream: it is a few words, and whole before any of it is certain."""
    base = {**head, "object": "chat.completion.chunk"}
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": words}, None), ({}, reason)]
    for delta, finish in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        extra = {"regrad": own} if finish else {}
        yield f"data: {json.dumps({**base, 'choices': [choice], **extra})}\n\n"
    if usage is not None:
        yield f"data: {json.dumps({**base, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
