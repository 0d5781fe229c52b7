"""The endpoints of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from graftwork.retrieval.retriever import Passage
from graftwork.serving import error_handlers
from graftwork.serving.auth import PAGE_PATH, AuthMiddleware
from graftwork.serving.chat import add_chat
from graftwork.serving.schemas import AddPassagesRequest, AnswerRequest
from graftwork.serving.service import Service


def create_app(service: Service, *, token: str | None = None) -> FastAPI:
    """The server as an ASGI application; its life is that of the thread which owns the model.

    Args:
        service: Does the work.
        token: Bearer token that every endpoint but /healthz asks for; None for none.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.queue.start()
        yield
        service.queue.close()

    # the pages that FastAPI makes of its own load scripts from elsewhere; and a body counts as JSON only if it says so,
    # because browsers send others to foreign servers without asking
    app = FastAPI(title="graftwork", lifespan=life, docs_url=None, redoc_url=None, strict_content_type=True)
    error_handlers.install(app)
    _add_answering(app, service)
    _add_passages(app, service)
    add_chat(app, service, wait_for_disconnect)
    _add_watching(app, service)
    if service.settings.page:
        from graftwork.serving.page import mount_page

        mount_page(app, service, token)

        @app.get("/", include_in_schema=False)
        async def _to_page() -> RedirectResponse:
            return RedirectResponse(f"{PAGE_PATH}/")

        @app.get("/favicon.ico", include_in_schema=False)
        async def _no_icon() -> Response:
            return Response(status_code=204)

    app.add_middleware(
        AuthMiddleware, token=token, max_body_bytes=service.settings.max_body_bytes, telemetry=service.telemetry
    )
    return app


def wait_for_disconnect(request: Request) -> Callable[[], Coroutine[Any, Any, None]]:
    """Waits until the client hangs up."""

    async def wait() -> None:
        # the body has been read, so that nothing else can come
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait


def _add_answering(app: FastAPI, service: Service) -> None:
    @app.post("/v1/answer")
    async def answer(ask: AnswerRequest, request: Request) -> dict[str, Any]:
        """Answer a question after the step that its passages' gradients make."""
        options = ask.model_dump(exclude={"question", "max_new_tokens"})
        question = service.question(ask.question, **options)
        served = await service.answer([question], max_new_tokens=ask.max_new_tokens, gone=wait_for_disconnect(request))
        return {"answer": served[0].answer.text, **service.record(served[0])}


def _add_passages(app: FastAPI, service: Service) -> None:
    @app.post("/v1/passages")
    async def add(new: AddPassagesRequest) -> dict[str, Any]:
        """Encode passages and keep them, in the bank and in the index."""
        passages = [Passage(one.id, one.text, one.title) for one in new.passages]
        return await service.add(passages, replace=new.replace)

    @app.delete("/v1/passages/{id:path}")
    async def delete(id: str) -> dict[str, Any]:
        """Forget a passage; no question that is asked after the reply sees it."""
        await service.delete(id)
        return {"deleted": id}

    @app.get("/v1/bank/stats")
    async def stats() -> dict[str, Any]:
        """How much is in the bank."""
        return await service.stats()


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def health() -> JSONResponse:
        """Whether questions are answered; 503 for good once weights were found to have changed."""
        if service.queue.healthy:
            return JSONResponse({"status": "ok", "waiting": len(service.queue)})
        found = "closing" if service.answerer.healthy else "weights differ from those at the start"
        return JSONResponse({"status": "unhealthy", "found": found}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, as Prometheus reads them."""
        return Response(service.telemetry.text(), headers={"Content-Type": service.telemetry.content_type})
