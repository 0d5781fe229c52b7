"""Exception handlers: every error becomes a status and a JSON body with found, expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from graftwork.errors import CheckpointMismatchError, ConfigError, DataError, GraftworkError, StorageError
from graftwork.methods.regrad.answering.in_place import WeightsChangedError
from graftwork.methods.regrad.bank.errors import (
    BankCorruptionError,
    BankLockedError,
    BankUnreachableError,
    DuplicatePassageError,
    MissingGradientError,
)
from graftwork.methods.regrad.text.prompting import ContextLengthError
from graftwork.retrieval.retriever import DamagedIndexError, IncompleteIndexError, IndexLockedError
from graftwork.retrieval.server_client import SearchServerError
from graftwork.serving.answer_stream import ClientDisconnectedError, DeadlineError, UnknownPassageError
from graftwork.serving.queued_request import BusyError, UnavailableError
from graftwork.serving.response_schemas import ErrorBody
from graftwork.serving.service import LimitError, RepeatedPassageError
from graftwork.serving.texts import reason_of

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; appears in metrics only."""
STATUSES: Sequence[tuple[type[GraftworkError], int]] = (
    (BusyError, 429),
    (UnavailableError, 503),
    (WeightsChangedError, 503),
    (BankLockedError, 503),
    (IndexLockedError, 503),
    (BankUnreachableError, 503),
    (BankCorruptionError, 503),
    (DamagedIndexError, 503),
    (IncompleteIndexError, 503),
    (SearchServerError, 503),
    (CheckpointMismatchError, 503),
    (StorageError, 503),
    (MissingGradientError, 503),
    (DeadlineError, 504),
    (ClientDisconnectedError, CLIENT_CLOSED_REQUEST),
    (UnknownPassageError, 404),
    (DuplicatePassageError, 409),
    (RepeatedPassageError, 409),
    (ContextLengthError, 413),
    (LimitError, 422),
    (DataError, 422),
    (ConfigError, 422),
)
"""Status of every error class; the first match counts. Other errors are internal server errors, 500."""
_MEANINGS: Mapping[int, str] = {
    400: "The request is malformed.",
    401: "The token is missing or wrong.",
    403: "The host is no local name, and the server has no token; or the token is that of a tenant.",
    404: "The passage, model or path does not exist.",
    408: "The body did not arrive in time.",
    409: "The id exists with another text, or twice in the request.",
    413: "The body is too large, or the question is too long for the model.",
    422: "A field is invalid or exceeds its limit.",
    429: "The queue is full.",
    500: "Unexpected error.",
    503: "The server does not answer, another writer holds the bank or the index, or one of them is damaged.",
    504: "The answer took longer than the timeout.",
}


def responses(body: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return entries of the OpenAPI document for 200 and for error statuses; those of the middleware are added.

    Args:
        body: Model of the body of a success.
        statuses: Statuses of errors.
    """
    every = sorted({400, 401, 403, 413, *statuses})
    errors = {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in every}
    return {200: {"model": body}, **errors}


def error_response(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error in the JSON shape of OpenAI's API."""
    return JSONResponse(error_body(status, message, kind), status, headers=dict(headers or {}))


def error_body(status: int, message: str, kind: str) -> dict[str, Any]:
    """Return the body of an error in the shape of OpenAI's API."""
    # messages may repeat keys and values of the request
    printable = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": printable, "type": kind, "code": status}}


def status_of(error: GraftworkError) -> int:
    """Return the HTTP status of an error."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def install_error_handlers(app: FastAPI) -> None:
    """Register handlers for library errors, invalid requests, HTTP errors and unexpected exceptions."""
    app.add_exception_handler(GraftworkError, _library_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _library_error(request: Request, error: Exception) -> JSONResponse:
    status = status_of(cast(GraftworkError, error))
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return error_response(status, " ".join(str(error).split()), type(error).__name__, headers)


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    problems = cast(RequestValidationError, error).errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        cause = problems[0].get("ctx", {}).get("error", "")
        return error_response(400, f"Found a body that is no JSON: {cause}. Send one JSON object.", "MalformedJson")
    return error_response(422, "; ".join(map(_problem, problems)), "InvalidRequest")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    refused = cast(HTTPException, error)
    if refused.status_code == 405:
        # Starlette names the methods of one route only
        refused.headers = {"Allow": ", ".join(_methods_of(request))}
    return error_response(refused.status_code, str(refused.detail), "InvalidRequest", refused.headers)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    # uvicorn closes the connection after an unexpected exception
    return error_response(500, unexpected(error), "ServerError", {"Connection": "close"})


def unexpected(error: Exception) -> str:
    """Return the message of an unexpected error."""
    return f"Unexpected error in the server ({type(error).__name__}); see its log for a traceback."


def _methods_of(request: Request) -> list[str]:
    """Methods of all routes with the path of a request."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return sorted(
        {method for one in routes if one.matches(request.scope)[0] != Match.NONE for method in one.methods or ()}
    )


def _problem(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    found = repr(problem.get("input"))
    shown = found if len(found) <= 80 else f"{found[:77]}…"
    return f"{where}: found {shown}; {reason_of(problem)}."
