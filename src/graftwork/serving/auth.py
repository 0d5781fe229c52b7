"""What a request must pass before any endpoint sees it: the token and the size limit; and what is counted of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from graftwork.serving.error_handlers import CLIENT_CLOSED_REQUEST, reply
from graftwork.serving.settings import LOCAL_HOSTS, TOKEN_VARIABLE

if TYPE_CHECKING:
    from graftwork.serving.telemetry import Telemetry

PAGE_PATH = "/page"
_OPEN_PATHS = ("/", "/healthz", "/favicon.ico")


class AuthMiddleware:
    """Refuses what has no token or is too large; counts everything.

    Args:
        app: What lies behind.
        token: The bearer token; None lets in whoever calls this machine by a name of its own. The page asks for it by
            itself.
        max_body_bytes: Longest body.
        telemetry: Counts requests.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, max_body_bytes: int, telemetry: Telemetry) -> None:
        self.app, self.token, self.max_body_bytes, self.telemetry = app, token, max_body_bytes, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, noted)
            else:
                await self.app(scope, self._limited(receive), noted)
        finally:
            endpoint = _endpoint(scope)
            self.telemetry.requests.labels(endpoint, str(status)).inc()
            self.telemetry.seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if self.token is not None and path not in _OPEN_PATHS and not _on_page(path):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self.token.encode()):
                message = "Found no valid token; expected the header `Authorization: Bearer TOKEN`."
                return reply(401, message, "Unauthorized", {"WWW-Authenticate": "Bearer"})
        if self.token is None and _host_of(headers) not in LOCAL_HOSTS:
            # a page of somebody else's may have given its own name this machine's address
            message = (
                f"Found host {_host_of(headers)!r}; without a token only this machine is answered. Put a token into "
            )
            return reply(403, f"{message}{TOKEN_VARIABLE}.", "Forbidden")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return reply(400, f"Found Content-Length {length!r}; expected a number.", "InvalidRequest")
        if int(length) > self.max_body_bytes:
            return reply(413, self._too_large(int(length)), "LimitError", {"Connection": "close"})
        return None

    def _limited(self, receive: Receive) -> Receive:
        """The body, up to the limit, for requests that do not say how long they are."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body_bytes:
                raise HTTPException(413, self._too_large(taken), {"Connection": "close"})
            return message

        return limited

    def _too_large(self, found: int) -> str:
        return f"Found a request of {found} bytes or more; expected at most {self.max_body_bytes}. Send less at once."


def _host_of(headers: Mapping[bytes, bytes]) -> str:
    """The name that the server was called by, without the port."""
    host = headers.get(b"host", b"").decode("latin-1")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _on_page(path: str) -> bool:
    return path == PAGE_PATH or path.startswith(f"{PAGE_PATH}/")


def _endpoint(scope: Scope) -> str:
    """The endpoint's pattern, so that ids never become labels."""
    if _on_page(scope["path"]):
        return PAGE_PATH
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
