"""ASGI application with the endpoints of the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse

from graftwork.retrieval.retriever import Passage
from graftwork.serving.answer_stream import DisconnectWaiter
from graftwork.serving.auth import METRICS_PATH, PAGE_PATH, AuthMiddleware
from graftwork.serving.chat import add_chat
from graftwork.serving.error_handlers import install_error_handlers, responses
from graftwork.serving.openapi import install_document, links_to_deletion
from graftwork.serving.response_schemas import (
    AddedBody,
    AnswerBody,
    DeletedBody,
    HealthBody,
    StatsBody,
    UnhealthyBody,
)
from graftwork.serving.schemas import AddPassagesRequest, AnswerRequest
from graftwork.serving.service import Service
from graftwork.serving.tenants import Tenant, Tenants, service_of
from graftwork.serving.texts import Identifier


def create_app(service: Service, *, token: str | None = None, tenants: Sequence[Tenant] = ()) -> FastAPI:
    """Return the ASGI application of a service; its lifespan starts and stops the threads.

    Args:
        service: Handles the requests.
        token: Bearer token required by every endpoint but /healthz; None requires none.
        tenants: Further banks with tokens of their own.
    """
    every = Tenants(service, token, tenants)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        for one in every.services:
            one.start()
        yield
        for one in reversed(every.services):
            one.close()

    # FastAPI's own documentation pages load scripts from other sites. The strict content type blocks cross-site
    # requests: browsers send text/plain to other sites without a preflight request, but not application/json
    app = FastAPI(
        title="graftwork",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        strict_content_type=True,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    _add_answering(app)
    _add_passages(app)
    add_chat(app, service, wait_for_disconnect)
    _add_monitoring(app, service)
    install_document(app, service, token=token is not None)
    if service.settings.page:
        from graftwork.serving.page import mount_page

        mount_page(app, every)
        for path in ("/", PAGE_PATH):
            app.add_api_route(path, _redirect_to_page, include_in_schema=False)
        app.add_api_route("/favicon.ico", _no_icon, include_in_schema=False)
    app.add_middleware(
        AuthMiddleware,
        tenants=every,
        max_body_bytes=service.settings.max_body_bytes,
        body_timeout=service.settings.body_timeout,
        telemetry=service.telemetry,
    )
    if service.settings.cors_origins:
        # outside the authentication: preflight requests carry no token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    return app


async def _redirect_to_page() -> RedirectResponse:
    return RedirectResponse(f"{PAGE_PATH}/")


async def _no_icon() -> Response:
    return Response(status_code=204)


def wait_for_disconnect(request: Request) -> DisconnectWaiter:
    """Return a coroutine function that returns once the client has disconnected."""

    async def wait() -> None:
        # the body has been read already, so the next message is the disconnect
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait


def _add_answering(app: FastAPI) -> None:
    async def answer(ask: AnswerRequest, request: Request) -> dict[str, Any]:
        """Answer a question after one gradient step on its passages."""
        service = service_of(request)
        options = ask.model_dump(exclude={"question", "max_new_tokens"})
        question = service.question(ask.question, **options)
        completions = await service.answer(
            [question], max_new_tokens=ask.max_new_tokens, disconnected=wait_for_disconnect(request)
        )
        return {"answer": completions[0].answer.text, **service.record(completions[0])}

    app.add_api_route(
        "/v1/answer",
        answer,
        methods=["POST"],
        response_model=None,
        responses=responses(AnswerBody, 404, 408, 422, 429, 500, 503, 504),
    )


def _add_passages(app: FastAPI) -> None:
    async def add(new: AddPassagesRequest, request: Request) -> dict[str, Any]:
        """Encode passages and store them in the bank and in the index."""
        passages = [Passage(one.id, one.text, one.title) for one in new.passages]
        return await service_of(request).add(passages, replace=new.replace)

    async def delete(id: Identifier, request: Request, erase: bool = False) -> dict[str, Any]:
        """Delete a passage; questions submitted after the response do not use it.

        With `erase`, its gradient, its text and older states are removed from the files, and the response contains the
        record of the search for them.
        """
        record = await service_of(request).delete(id, erase=erase)
        return {"deleted": id, **({} if record is None else {"erasure": record})}

    async def delete_by_query(
        id: Annotated[Identifier, Query()], request: Request, erase: bool = False
    ) -> dict[str, Any]:
        """Delete a passage whose id is no path, such as `..`; `erase` removes it from the files too."""
        return await delete(id, request, erase)

    async def stats(request: Request) -> dict[str, Any]:
        """Return the size of the bank and the fingerprints of model and bank."""
        return await service_of(request).stats()

    adding = responses(AddedBody, 408, 409, 422, 429, 500, 503)
    adding[200].update(links_to_deletion("delete_passage", "delete_passage_by_path"))
    deleting = responses(DeletedBody, 404, 422, 429, 500, 503)
    app.add_api_route("/v1/passages", add, methods=["POST"], response_model=None, responses=adding)
    app.add_api_route(
        "/v1/passages",
        delete_by_query,
        methods=["DELETE"],
        response_model=None,
        responses=deleting,
        operation_id="delete_passage",
    )
    app.add_api_route(
        "/v1/passages/{id:path}",
        delete,
        methods=["DELETE"],
        response_model=None,
        responses=deleting,
        operation_id="delete_passage_by_path",
    )
    app.add_api_route(
        "/v1/bank/stats",
        stats,
        methods=["GET"],
        response_model=None,
        responses=responses(StatsBody, 422, 429, 500, 503),
    )


def _add_monitoring(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        """Return 200 while questions are answered; 503 while closing, and permanently once weights have changed."""
        if service.queue.healthy:
            return JSONResponse({"status": "ok", "waiting": len(service.queue)})
        found = service.queue.problem
        return JSONResponse({"status": "unhealthy", "found": found}, 503)

    async def metrics() -> Response:
        """Return metrics in Prometheus' text format."""
        return Response(service.telemetry.text(), headers={"Content-Type": service.telemetry.content_type})

    unhealthy: dict[str, Any] = {
        "model": UnhealthyBody,
        "description": "Questions are not answered; `found` names the reason.",
    }
    app.add_api_route(
        "/healthz", health, methods=["GET"], response_model=None, responses={**responses(HealthBody), 503: unhealthy}
    )
    text: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    app.add_api_route(
        METRICS_PATH, metrics, methods=["GET"], responses={**responses(HealthBody), 200: text}, response_class=Response
    )
