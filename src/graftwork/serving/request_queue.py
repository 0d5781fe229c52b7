"""Request queue with a single model thread; questions that wait together are answered in one batch."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork.core.native import first_line
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.bank.files import CommitRecord
    from graftwork.methods.regrad.text.requests import Answer, Question, RetrievedUpdate
    from graftwork.serving.settings import ServeSettings
    from graftwork.serving.telemetry import Telemetry

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class BusyError(GraftworkError, RuntimeError):
    """The request queue is full."""


class UnavailableError(GraftworkError, RuntimeError):
    """The server no longer answers: it is closing, or the weights have changed."""


class ModelThreadError(GraftworkError, RuntimeError):
    """Work on the model thread ended with an exception that no caller can handle, such as a panic of a Rust library."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer with the server's own measurements."""

    answer: Answer
    waited: float
    """Seconds between arrival and the start of the batch."""
    prompt_tokens: int
    complete: bool
    """True if a stop token ended the answer; False if the limit of new tokens did."""
    bank: str | None
    """Digest of the bank's ids when the question was answered; None without a bank."""


def _completion_future() -> Future[Completion]:
    return Future()


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A question that waits in the queue or is being answered."""

    question: Question
    max_new_tokens: int
    future: Future[Completion] = field(default_factory=_completion_future)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """True once the client has disconnected or timed out; generation stops before the next token."""

    def cancel(self) -> None:
        """Mark the request as cancelled. Has no effect on a finished request."""
        self.cancelled = True
        self.future.cancel()

    def set_result(self, result: Completion | BaseException) -> None:
        """Complete the future with a result or an error, unless it was cancelled."""
        try:
            if isinstance(result, BaseException):
                self.future.set_exception(_for_future(result))
            else:
                self.future.set_result(result)
        except InvalidStateError:
            self.cancelled = True


class RequestQueue:
    """Queue of questions and bank changes, processed by a single model thread. Thread-safe.

    Changes of the bank have priority over questions. Gradients are retrieved when a batch starts, so an answer reflects
    every change that finished before its question was submitted. Questions with different limits of new tokens never
    share a batch, because the room for passages in a prompt depends on the limit; all other options may differ.

    Args:
        answerer: Used by the model thread only.
        settings: Batch size, queue size and limits.
        telemetry: Receives batch sizes and token counts.
    """

    def __init__(self, answerer: Answerer, settings: ServeSettings, telemetry: Telemetry) -> None:
        self.answerer, self.settings, self.telemetry = answerer, settings, telemetry
        self._questions: deque[QueuedRequest] = deque()
        self._changes: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._ended = False
        self._unchecked = 0
        self._compacted: CommitRecord | None = None
        self._thread = threading.Thread(target=self._work, name="graftwork-model", daemon=True)

    def start(self) -> None:
        """Start the model thread; return once the digest of the weights is stored for later comparison."""
        self._thread.start()
        self.run_between_batches(self.answerer.check_weights).result()

    def close(self) -> None:
        """Finish the current batch and reject the remaining requests."""
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

    def __len__(self) -> int:
        """Number of waiting questions."""
        return len(self._questions)

    def submit(self, questions: Sequence[Question], max_new_tokens: int) -> list[QueuedRequest]:
        """Add questions to the queue, all of them or none.

        Raises:
            BusyError: If the queue has no room for all of them.
            UnavailableError: If the server no longer answers.
        """
        with self._wake:
            self._check()
            if len(self._questions) + len(questions) > self.settings.queue_size:
                raise BusyError(
                    f"Found {len(self._questions)} questions waiting; expected room for {len(questions)} more among "
                    f"{self.settings.queue_size}. Ask again later."
                )
            requests = [QueuedRequest(question, max_new_tokens) for question in questions]
            self._questions.extend(requests)
            self._wake.notify_all()
        return requests

    def run_between_batches(self, action: Callable[[], Result]) -> Future[Result]:
        """Run an action on the model thread, between two batches.

        Raises:
            BusyError: If too many actions are waiting.
            UnavailableError: If the server is closing.
        """
        future: Future[Result] = Future()
        with self._wake:
            if len(self._changes) >= self.settings.queue_size:
                raise BusyError(f"Found {len(self._changes)} changes waiting; expected fewer. Ask again later.")
            if self._closing or self._ended:
                raise self._unavailable()
            self._changes.append((action, future))
            self._wake.notify_all()
        return future

    def _work(self) -> None:
        try:
            while not self._closing:
                self._work_once()
        finally:
            # requests are rejected from now on, whatever ended the loop
            with self._wake:
                self._ended = True
            self._reject_rest()

    def _work_once(self) -> None:
        """Wait for a change or a batch and process it. Exceptions of any kind fail the requests, not the thread."""
        with self._wake:
            idle = not self._wake.wait_for(
                lambda: self._changes or self._questions or self._closing, self.settings.compact_after or None
            )
        if idle:
            self._compact()
        elif self._changes:
            self._run_action(*self._changes.popleft())
        elif batch := self._next_batch():
            try:
                self._answer_batch(batch)
            except BaseException as error:
                self.telemetry.failures.inc()
                for one in batch:
                    one.set_result(error)

    def _next_batch(self) -> list[QueuedRequest]:
        """The first waiting question and those that can share its batch; empty if a change is waiting."""
        size = self.settings.batch_size
        with self._wake:
            while self._questions and self._questions[0].cancelled:
                self._questions.popleft()
            if not self._questions:
                return []
            left = self._questions[0].arrived + self.settings.batch_wait - time.monotonic()
            if left > 0:
                self._wake.wait_for(
                    lambda: len(self._questions) >= size or self._changes or self._closing, timeout=left
                )
            if self._changes or self._closing:
                return []
            tokens = self._questions[0].max_new_tokens
            batch: list[QueuedRequest] = []
            others: list[QueuedRequest] = []
            for one in self._questions:
                fits = one.max_new_tokens == tokens and len(batch) < size
                if not one.cancelled:
                    (batch if fits else others).append(one)
            self._questions = deque(others)
        return batch

    def _answer_batch(self, batch: Sequence[QueuedRequest]) -> None:
        began = time.monotonic()
        ready: list[tuple[QueuedRequest, RetrievedUpdate, int]] = []
        states: list[str | None] = []
        bank = self.answerer.gradient_retriever.bank
        for one in batch:
            # retrieved one by one, so that an error fails its own question only
            try:
                update = self.answerer.gradient_retriever.retrieve([one.question])[0]
                length = len(self.answerer.prompts.build(one.question, update.hits, one.max_new_tokens))
                ready.append((one, update, length))
                states.append(None if bank is None else bank.commit_record.ids_digest)
            except BaseException as error:
                one.set_result(error)
        if not ready:
            return
        try:
            answers: Sequence[Answer | BaseException] = self._generate(ready)
        except BaseException as error:
            answers = [error] if len(ready) == 1 else [self._retry_alone(row) for row in ready]
        self._unchecked += len(ready)
        if self._unchecked >= self.settings.check_every:
            self._unchecked = 0
            # before the answers are sent
            self.answerer.check_weights()
        if not self.answerer.healthy:
            answers = [weights_changed()] * len(ready)
        self.telemetry.batch.observe(len(ready))
        for (one, _, length), answer, state in zip(ready, answers, states, strict=True):
            if isinstance(answer, BaseException):
                one.set_result(answer)
                continue
            self.telemetry.tokens.inc(answer.tokens)
            one.set_result(
                Completion(answer, began - one.arrived, length, self._is_complete(answer, one.max_new_tokens), state)
            )

    def _generate(self, rows: Sequence[tuple[QueuedRequest, RetrievedUpdate, int]]) -> list[Answer]:
        return self.answerer.generate(
            [update for _, update, _ in rows],
            max_new_tokens=rows[0][0].max_new_tokens,
            cancelled=lambda number: rows[number][0].cancelled,
        )

    def _retry_alone(self, row: tuple[QueuedRequest, RetrievedUpdate, int]) -> Answer | BaseException:
        """Answer one row of a failed batch alone, so that only the row that caused the error fails."""
        try:
            return self._generate([row])[0]
        except BaseException as error:
            return error

    def _is_complete(self, answer: Answer, max_new_tokens: int) -> bool:
        """True unless the limit of new tokens ended the answer."""
        last = answer.generated[-1] if answer.generated else None
        return (
            answer.tokens < max_new_tokens
            or len(answer.generated) < answer.tokens
            or last in self.answerer.prompts.stop_tokens
        )

    def _compact(self) -> None:
        """Remove the bytes of deleted passages, unless nothing has changed since the last call."""
        bank = self.answerer.gradient_retriever.bank
        try:
            self.answerer.gradient_retriever.refresh()
            state = None if bank is None else bank.commit_record
            if state != self._compacted:
                self.answerer.remove_deleted()
                self._compacted = None if bank is None else bank.commit_record
        except GraftworkError as error:
            # another writer, a read-only folder or a full disk; questions report errors of bank and index themselves
            logger.warning("Could not compact the bank: %s", error)

    def _run_action(self, action: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = action()
        except BaseException as error:
            future.set_exception(_for_future(error))
        else:
            future.set_result(result)

    def _reject_rest(self) -> None:
        with self._wake:
            for one in self._questions:
                one.set_result(self._unavailable())
            for _, future in self._changes:
                if future.set_running_or_notify_cancel():
                    future.set_exception(self._unavailable())
            self._questions.clear()
            self._changes.clear()

    def _check(self) -> None:
        if not self.answerer.healthy:
            raise weights_changed()
        if not self.healthy:
            raise self._unavailable()

    def _unavailable(self) -> UnavailableError:
        if self._ended and not self._closing:
            return UnavailableError("Found a model thread that has ended; the server no longer answers. Restart it.")
        return _closed()


def _for_future(error: BaseException) -> Exception:
    """The error itself, or one that asyncio can deliver, which treats CancelledError and StopIteration as its own."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    name = type(error).__name__
    found = ModelThreadError(f"Found {name} on the model thread ({first_line(error)}). The server goes on; ask again.")
    found.__cause__ = error
    return found


def weights_changed() -> UnavailableError:
    """Return the error of every request after the weights were found to have changed."""
    return UnavailableError(
        "Found weights that differ from those at the start; the server no longer answers. Restart it."
    )


def _closed() -> UnavailableError:
    return UnavailableError("The server is closing and no longer answers. Retry once it is back.")
