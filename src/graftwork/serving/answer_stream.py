"""Answers in parts, from the model thread to a request handler on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork.errors import GraftworkError
from graftwork.methods.regrad.bank.errors import MissingGradientError
from graftwork.serving.queued_request import Completion, Delta, QueuedRequest

if TYPE_CHECKING:
    from graftwork.serving.telemetry import Telemetry

DisconnectWaiter = Callable[[], Coroutine[Any, Any, None]]
"""Coroutine function that returns once the client has disconnected."""
Event = tuple[int, Delta | Future[Completion]]


class UnknownPassageError(GraftworkError, LookupError):
    """A request names a passage that does not exist."""


class DeadlineError(GraftworkError, TimeoutError):
    """An answer took longer than the timeout."""


class ClientDisconnectedError(GraftworkError, ConnectionError):
    """The client disconnected before its answer was complete."""


class AnswerStream:
    """Parts and completions of the answers to one request, in the order in which they are generated.

    Create it on the event loop, before the requests are submitted.

    Args:
        requests: The questions; they are cancelled once `events` ends.
        timeout: Seconds within which the next event must arrive.
        telemetry: Counts questions that were given up.
        disconnected: Returns once the client has disconnected; None does not watch for it.
        parts: Yield the parts of answers, too.
    """

    def __init__(
        self,
        requests: Sequence[QueuedRequest],
        timeout: float,
        telemetry: Telemetry,
        disconnected: DisconnectWaiter | None,
        *,
        parts: bool,
    ) -> None:
        self.requests, self.timeout, self.telemetry = requests, timeout, telemetry
        self._disconnected = disconnected
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for number, one in enumerate(requests):
            if parts:
                one.listener = partial(self._put, number)
            one.future.add_done_callback(partial(self._put_done, number))

    async def events(self, end: float | None = None) -> AsyncGenerator[tuple[int, Delta | Completion]]:
        """Yield the number of a question with a part of its answer or its completion, until all are complete.

        Args:
            end: Time of the monotonic clock at which all answers must be complete; None limits each wait instead.

        Raises:
            DeadlineError: If the next event takes too long.
            ClientDisconnectedError: If the client disconnects.
            UnknownPassageError: If a named passage has no gradient.
        """
        watched = None if self._disconnected is None else asyncio.ensure_future(self._disconnected())
        left = len(self.requests)
        try:
            while left:
                number, event = await self._next(watched, end)
                if isinstance(event, Delta):
                    yield number, event
                    continue
                left -= 1
                yield number, self._result(number, event)
        except (asyncio.CancelledError, GeneratorExit):
            self._count("gone")
            raise
        finally:
            # no effect on completed questions
            for one in self.requests:
                one.cancel()
            if watched is not None:
                watched.cancel()

    def _result(self, number: int, future: Future[Completion]) -> Completion:
        try:
            return future.result()
        except MissingGradientError as error:
            if self.requests[number].question.passages is not None:
                raise UnknownPassageError(str(error)) from None
            raise

    async def _next(self, watched: asyncio.Future[None] | None, end: float | None) -> Event:
        if not self._events.empty():
            return self._events.get_nowait()
        waiting = asyncio.ensure_future(self._events.get())
        timeout = self.timeout if end is None else max(0.0, end - time.monotonic())
        try:
            both: list[asyncio.Future[Any]] = [waiting, *([] if watched is None else [watched])]
            await asyncio.wait(both, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            gone = watched is not None and watched.done()
            self._count("gone" if gone else "timeout")
            if gone:
                raise ClientDisconnectedError("The client has disconnected.")
            raise DeadlineError(
                f"Found no answer within {self.timeout:g} seconds. Ask again later, or for fewer tokens."
            )
        finally:
            waiting.cancel()

    def _count(self, reason: str) -> None:
        """Count the questions that are given up."""
        self.telemetry.abandoned.labels(reason).inc(sum(not one.future.done() for one in self.requests))

    def _put(self, number: int, event: Delta | Future[Completion]) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    def _put_done(self, number: int, future: Future[Completion]) -> None:
        # cancelled futures have no reader, and the loop may be closed
        if not future.cancelled():
            with suppress(RuntimeError):
                self._put(number, future)
