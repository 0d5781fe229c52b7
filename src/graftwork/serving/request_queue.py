"""Request queue with a single model thread: questions join the running batch at its next token."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from graftwork.serving.queued_request import (
    Actions,
    BusyError,
    QueuedRequest,
    UnavailableError,
    enqueue,
    reject_all,
    run_action,
)

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.text.requests import RetrievedUpdate
    from graftwork.serving.settings import ServeSettings
    from graftwork.serving.telemetry import Telemetry

Result = TypeVar("Result")


class RequestQueue:
    """Queue of questions, answered by a single model thread in one running batch. Thread-safe.

    A question joins the batch at its next token as soon as a row is free, and leaves with its own last token, so that a
    long answer never delays a short one. Gradients are retrieved when a question joins, so an answer reflects every
    change that finished before its question was submitted. Rows differ in all options, and in their bank.

    Args:
        answerer: Model of all questions; used by the model thread only.
        settings: Batch size, queue size and limits.
        telemetry: Receives batch sizes and token counts.
    """

    def __init__(self, answerer: Answerer, settings: ServeSettings, telemetry: Telemetry) -> None:
        self.answerer, self.settings, self.telemetry = answerer, settings, telemetry
        self._decoder = answerer.decoder()
        self._questions: deque[QueuedRequest] = deque()
        self._prepared: deque[QueuedRequest] = deque()
        self._active: list[QueuedRequest] = []
        self._actions: Actions = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._ended = False
        self._busy_until = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="graftwork-model", daemon=True)

    def start(self) -> None:
        """Start the model thread; return once the digest of the weights is stored for later comparison."""
        self._thread.start()
        self.run_between_batches(self.answerer.check_weights).result()

    def close(self) -> None:
        """Finish the answers in progress and reject the remaining requests."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """True if the queue accepts questions."""
        return self.problem is None and self._thread.is_alive()

    @property
    def problem(self) -> str | None:
        """Reason for which questions are rejected; None if there is none."""
        if not self.answerer.healthy:
            return "weights differ from those at the start"
        if self._ended and not self._closing:
            return "the model thread has ended; restart the server"
        return "closing" if self._closing else None

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last question was answered; 0 while there are some."""
        return 0.0 if self._questions or self._active else time.monotonic() - self._busy_until

    def __len__(self) -> int:
        """Number of waiting questions."""
        return len(self._questions) + len(self._prepared)

    def submit(self, requests: Sequence[QueuedRequest]) -> None:
        """Add questions to the queue, all of them or none.

        Raises:
            BusyError: If the queue has no room for all of them.
            UnavailableError: If the server no longer answers.
        """
        with self._wake:
            self.check()
            if len(self) + len(requests) > self.settings.queue_size:
                raise BusyError(
                    f"Found {len(self)} questions waiting; expected room for {len(requests)} more among "
                    f"{self.settings.queue_size}. Ask again later."
                )
            self._questions.extend(requests)
            self._wake.notify_all()

    def run_between_batches(self, action: Callable[[], Result]) -> Future[Result]:
        """Run an action on the model thread, between two tokens.

        Raises:
            BusyError: If too many actions are waiting.
            UnavailableError: If the server is closing.
        """
        with self._wake:
            if self._closing or self._ended:
                raise self._unavailable()
            future = enqueue(self._actions, action, self.settings.queue_size)
            self._wake.notify_all()
        return future

    def check(self) -> None:
        """Raise an error if questions are not answered.

        Raises:
            UnavailableError: If the weights have changed, the server is closing, or its model thread has ended.
        """
        if not self.answerer.healthy:
            raise weights_changed()
        if not self.healthy:
            raise self._unavailable()

    def _work(self) -> None:
        try:
            while self._active or not self._closing:
                self._work_once()
        finally:
            # requests are rejected from now on, whatever ended the loop
            with self._wake:
                self._ended = True
            self._reject_rest()

    def _work_once(self) -> None:
        """Run an action, and generate one token of every row. Exceptions fail the requests, not the thread."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._actions or self._questions or self._prepared or self._active or self._closing
            )
        # one at a time, so that many of them do not hold up the answers in progress
        if self._actions:
            run_action(*self._actions.popleft())
        joining: list[QueuedRequest] = []
        try:
            self._drop_cancelled()
            joining = [] if self._closing else self._next_rows()
            self._advance(joining)
        except BaseException as error:
            self.telemetry.failures.inc()
            for one in (*self._active, *joining):
                one.set_result(error)
            self._active = []
            self._decoder.clear()
        if joining or self._active:
            self._busy_until = time.monotonic()

    def _drop_cancelled(self) -> None:
        gone = [one for one in self._active if one.cancelled]
        if gone:
            self._active = [one for one in self._active if not one.cancelled]
            self._decoder.leave([one.row for one in gone if one.row is not None])

    def _next_rows(self) -> list[QueuedRequest]:
        """Waiting questions that join now: as many as rows are free, up to the limit of prompt tokens."""
        free = self.settings.batch_size - len(self._active)
        if len(self._prepared) < free:
            with self._wake:
                taken: list[QueuedRequest] = []
                while self._questions and len(self._prepared) + len(taken) < free:
                    one = self._questions.popleft()
                    taken += [] if one.cancelled else [one]
            self._prepared.extend(self._retrieved(taken))
        joining: list[QueuedRequest] = []
        longest = 0
        while self._prepared and len(joining) < free:
            one = self._prepared[0]
            longest = max(longest, 0 if one.row is None else len(one.row.prompt))
            if joining and longest * (len(joining) + 1) > self.settings.prefill_tokens:
                break
            self._prepared.popleft()
            joining += [] if one.cancelled else [one]
        return joining

    def _retrieved(self, taken: Sequence[QueuedRequest]) -> list[QueuedRequest]:
        """Questions whose passages, gradients and prompt were found; the others have failed."""
        ready: list[QueuedRequest] = []
        for answerer in {id(one.answerer): one.answerer for one in taken}.values():
            own = [one for one in taken if one.answerer is answerer]
            updates: Sequence[RetrievedUpdate | None]
            try:
                updates = answerer.gradient_retriever.retrieve([one.question for one in own])
            except BaseException:
                # again one by one, so that an error fails its own question only
                updates = [None] * len(own)
            for one, update in zip(own, updates, strict=True):
                try:
                    one.start(update or answerer.gradient_retriever.retrieve([one.question])[0])
                    ready.append(one)
                except BaseException as error:
                    one.set_result(error)
        return ready

    def _advance(self, joining: Sequence[QueuedRequest]) -> None:
        """Generate the next token of all rows, and the first of those that join."""
        rows = [one.row for one in joining if one.row is not None]
        if not (rows or self._active):
            return
        running = list(self._active)
        try:
            if running:
                self._decoder.step()
            if rows:
                self._decoder.join(rows)
            self._active += joining
        except BaseException:
            self._active = self._restarted([*running, *joining])
        self.telemetry.batch.observe(len(self._active))
        self.telemetry.tokens.inc(len(self._active))
        done = [one for one in self._active if one.advance()]
        if done:
            self._finish(done)

    def _restarted(self, requests: Sequence[QueuedRequest]) -> list[QueuedRequest]:
        """Process all rows again, each alone, after a failed batch: only the rows that caused the error fail."""
        self._decoder.clear()
        left: list[QueuedRequest] = []
        for one in requests:
            try:
                if one.row is not None and not one.row.finished:
                    self._decoder.join([one.row])
                left.append(one)
            except BaseException as error:
                one.set_result(error)
        return left

    def _finish(self, done: Sequence[QueuedRequest]) -> None:
        # before the answers are complete; in parts, because all weights at once would hold up the other answers
        self.answerer.check_weights(len(done) / self.settings.check_every)
        if not self.answerer.healthy:
            raise weights_changed()
        finished = set(map(id, done))
        self._active = [one for one in self._active if id(one) not in finished]
        self._decoder.leave([one.row for one in done if one.row is not None])
        for one in done:
            one.set_result(one.completion())

    def _reject_rest(self) -> None:
        with self._wake:
            for one in (*self._questions, *self._prepared, *self._active):
                one.set_result(self._unavailable())
            reject_all(self._actions, self._unavailable())
            for waiting in (self._questions, self._prepared, self._active):
                waiting.clear()

    def _unavailable(self) -> UnavailableError:
        if self._ended and not self._closing:
            return UnavailableError("Found a model thread that has ended; the server no longer answers. Restart it.")
        return closed()


def weights_changed() -> UnavailableError:
    """Return the error of every request after the weights were found to have changed."""
    return UnavailableError(
        "Found weights that differ from those at the start; the server no longer answers. Restart it."
    )


def closed() -> UnavailableError:
    """Return the error of requests to a server that is closing."""
    return UnavailableError("The server is closing and no longer answers. Retry once it is back.")
