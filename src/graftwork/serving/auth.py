"""Middleware in front of all endpoints: bearer token, host check, size limit, and request metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftwork.core.native import panics_as_errors
from graftwork.serving.error_handlers import CLIENT_CLOSED_REQUEST, error_response
from graftwork.serving.settings import LOCAL_HOSTS, TOKEN_VARIABLE
from graftwork.serving.tenants import SCOPE_KEY, Tenants

if TYPE_CHECKING:
    from graftwork.serving.telemetry import Telemetry

PAGE_PATH = "/page"
METRICS_PATH = "/metrics"
OPEN_PATHS = ("/", "/healthz", "/favicon.ico")
"""Paths that need no token."""


class AuthMiddleware:
    """Reject requests without the token or above the size limit; count all requests.

    Args:
        app: The wrapped application.
        tenants: Services by bearer token; without a token, every request whose host is a local name is accepted. The
            page has its own login.
        max_body_bytes: Maximum size of a request body.
        body_timeout: Seconds within which a request body must arrive.
        telemetry: Receives counts and durations of requests.
    """

    def __init__(
        self, app: ASGIApp, *, tenants: Tenants, max_body_bytes: int, body_timeout: float, telemetry: Telemetry
    ) -> None:
        self.app, self.tenants, self.telemetry = app, tenants, telemetry
        self.max_body_bytes, self.body_timeout = max_body_bytes, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the application, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            rejection = self._rejection(scope)
            if rejection is not None:
                await rejection(scope, receive, record_status)
            else:
                with panics_as_errors(str(scope["path"])):
                    await self.app(scope, self._limited(receive), record_status)
        finally:
            endpoint = _endpoint(scope)
            self.telemetry.requests.labels(endpoint, str(status)).inc()
            self.telemetry.seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _rejection(self, scope: Scope) -> ASGIApp | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        path = str(scope["path"])
        scope[SCOPE_KEY] = self.tenants.main
        if self.tenants.token is not None and path not in OPEN_PATHS and not _on_page(path):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            service = self.tenants.find(given) if kind.lower() == b"bearer" else None
            if service is None:
                message = "Found no valid token; expected the header `Authorization: Bearer TOKEN`."
                return error_response(401, message, "Unauthorized", {"WWW-Authenticate": "Bearer"})
            if path == METRICS_PATH and service is not self.tenants.main:
                message = "Found the token of a tenant; metrics of all tenants need the server's own token."
                return error_response(403, message, "Forbidden")
            scope[SCOPE_KEY] = service
        if self.tenants.token is None and _host_of(headers) not in LOCAL_HOSTS:
            # DNS rebinding: a foreign site may have resolved its own name to this machine's address
            message = (
                f"Found host {_host_of(headers)!r}; without a token only requests to a local name are answered. Set "
                f"{TOKEN_VARIABLE}."
            )
            return error_response(403, message, "Forbidden")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return error_response(400, f"Found Content-Length {length!r}; expected a number.", "InvalidRequest")
        if int(length) > self.max_body_bytes:
            return error_response(413, self._too_large(int(length)), "LimitError", {"Connection": "close"})
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Enforce the size limit, for requests without Content-Length, and the time limit while the body is read."""
        size, complete = 0, False
        end: float | None = None

        async def limited() -> Message:
            nonlocal size, complete, end
            if complete:
                return await receive()
            # the time counts from the first read: an application may read later than the request arrived
            end = time.monotonic() + self.body_timeout if end is None else end
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"Found no complete body within {self.body_timeout:g} seconds. Send it faster.",
                    {"Connection": "close"},
                ) from None
            complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(413, self._too_large(size), {"Connection": "close"})
            return message

        return limited

    def _too_large(self, found: int) -> str:
        return f"Found a request of {found} bytes or more; expected at most {self.max_body_bytes}. Send less at once."


def _host_of(headers: Mapping[bytes, bytes]) -> str:
    """Host name of the request, without the port."""
    host = headers.get(b"host", b"").decode("latin-1")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _on_page(path: str) -> bool:
    return path == PAGE_PATH or path.startswith(f"{PAGE_PATH}/")


def _endpoint(scope: Scope) -> str:
    """Route pattern of the request, so that ids never become metric labels."""
    if _on_page(str(scope["path"])):
        return PAGE_PATH
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
