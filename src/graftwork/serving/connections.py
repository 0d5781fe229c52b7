"""HTTP connections with a limit of their number, and time-outs for headers and for clients that do not read."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from graftwork.serving.error_handlers import error_response
from graftwork.serving.settings import ServeSettings

# one line for each malformed request or disconnect of a client would fill the log; metrics count them
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 connection that is closed if its number is above the limit, or its headers do not arrive in time."""

    settings: ServeSettings
    _header_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first headers, or refuse the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            message = f"Found {self.settings.max_connections} open connections; expected fewer. Connect again later."
            transport.write(_raw(503, message))
            transport.close()
            return
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the timer once the headers are complete; start one for the next headers and for unread bodies."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        in_headers = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not (in_headers or self._is_refused_body()):
            self._stop_timer()
        elif self._header_timer is None:
            self._start_timer()

    def _is_refused_body(self) -> bool:
        """True if the client still sends the body of a request that was answered without it."""
        answered = self.cycle is not None and self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
        return answered and self.conn.their_state is h11.SEND_BODY

    def pause_writing(self) -> None:
        """Start the timer of a client that does not read its responses: the buffers are full."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.settings.body_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of a client that reads."""
        self._stop_read_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.settings.header_timeout, self._close_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _close_slow(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if not self._is_refused_body():
            message = f"Found no complete headers within {self.settings.header_timeout:g} seconds. Send them faster."
            self.transport.write(_raw(408, message))
        self.transport.close()


def limited_protocol(settings: ServeSettings) -> type[LimitedProtocol]:
    """Return the protocol class of a server with these settings."""
    return type("LimitedProtocol", (LimitedProtocol,), {"settings": settings})


def _raw(status: int, message: str) -> bytes:
    """Complete HTTP response with an error, for connections without a request."""
    response: Any = error_response(status, message, "LimitError", {"Connection": "close", "Retry-After": "1"})
    reason = {408: "Request Timeout", 503: "Service Unavailable"}[status]
    headers = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return f"HTTP/1.1 {status} {reason}\r\n".encode() + headers + b"\r\n" + response.body
