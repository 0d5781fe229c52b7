"""Errors as replies: a status, and JSON that says what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from graftwork.errors import ConfigError, DataError, GraftworkError
from graftwork.methods.regrad.answering.in_place import WeightsChangedError
from graftwork.methods.regrad.bank.errors import BankLockedError, DuplicatePassageError
from graftwork.serving.request_queue import BusyError, UnavailableError
from graftwork.serving.service import ClientDisconnectedError, DeadlineError, LimitError, UnknownPassageError

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; nginx's number for the log."""
STATUSES: Sequence[tuple[type[GraftworkError], int]] = (
    (BusyError, 429),
    (UnavailableError, 503),
    (WeightsChangedError, 503),
    (BankLockedError, 503),
    (DeadlineError, 504),
    (ClientDisconnectedError, CLIENT_CLOSED_REQUEST),
    (UnknownPassageError, 404),
    (DuplicatePassageError, 409),
    (LimitError, 413),
    (DataError, 422),
    (ConfigError, 422),
)
"""The first that fits counts; any other error is the server's own fault, 500."""


def reply(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in the shape that OpenAI's clients read as well."""
    body = {"error": {"message": message, "type": kind, "code": status}}
    return JSONResponse(body, status, headers=dict(headers or {}))


def status_of(error: GraftworkError) -> int:
    """The status that an error is told with."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def install(app: FastAPI) -> None:
    """Have every error of the app told this way."""

    @app.exception_handler(GraftworkError)
    async def _known(request: Request, error: GraftworkError) -> JSONResponse:
        status = status_of(error)
        headers = {"Retry-After": "1"} if status in (429, 503) else {}
        return reply(status, " ".join(str(error).split()), type(error).__name__, headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        if any(problem["type"] == "json_invalid" for problem in problems):
            cause = problems[0].get("ctx", {}).get("error", "")
            return reply(400, f"Found a body that is no JSON: {cause}. Send one JSON object.", "MalformedJson")
        return reply(422, "; ".join(map(_problem, problems)), "InvalidRequest")

    @app.exception_handler(HTTPException)
    async def _refused(request: Request, error: HTTPException) -> JSONResponse:
        return reply(error.status_code, str(error.detail), "InvalidRequest", error.headers)

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        return reply(500, f"Something unforeseen went wrong ({type(error).__name__}); the log has more.", "ServerError")


def _problem(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    found = repr(problem.get("input"))
    shown = found if len(found) <= 80 else f"{found[:77]}…"
    return f"{where}: found {shown}; {problem['msg']}."
