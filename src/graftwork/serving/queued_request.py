"""Questions in the queue of the server, their answers in parts, and the errors that answers end with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork.core.native import first_line
from graftwork.errors import GraftworkError
from graftwork.methods.regrad.text.streaming import TextStream

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.answering.decoding import DecodingRow
    from graftwork.methods.regrad.text.requests import Answer, Question, RetrievedUpdate, TokenProbability

Result = TypeVar("Result")


class BusyError(GraftworkError, RuntimeError):
    """The request queue is full."""


class UnavailableError(GraftworkError, RuntimeError):
    """The server no longer answers: it is closing, or the weights have changed."""


class ModelThreadError(GraftworkError, RuntimeError):
    """Work on a thread ended with an exception that no caller can handle, such as a panic of a Rust library."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New part of an answer in progress."""

    text: str
    """New text; may be empty."""
    probabilities: tuple[TokenProbability, ...] = ()
    """Probabilities of the new tokens, if requested."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer with the server's own measurements."""

    answer: Answer
    waited: float
    """Seconds between arrival and the start of the answer."""
    first_token: float
    """Seconds between arrival and the first token."""
    prompt_tokens: int
    complete: bool
    """True if a stop token or a stop sequence ended the answer; False if the limit of new tokens did."""
    bank: str | None
    """Digest of the bank's ids when the question was answered; None without a bank."""


def _completion_future() -> Future[Completion]:
    return Future()


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A question that waits in the queue or is being answered."""

    answerer: Answerer
    """Retrieves the passages and gradients of the question."""
    question: Question
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Sequences that end the answer."""
    top: int | None = None
    """Number of most likely tokens to report with each token; None reports no probabilities."""
    listener: Callable[[Delta], None] | None = None
    """Receives the parts of the answer, on the model thread."""
    future: Future[Completion] = field(default_factory=_completion_future)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """True once the client has disconnected or timed out; generation stops before the next token."""
    row: DecodingRow | None = None
    stream: TextStream | None = None
    bank: str | None = None
    waited: float = 0.0
    first_token: float | None = None
    sent: int = 0
    """Number of tokens whose probabilities were sent."""

    def cancel(self) -> None:
        """Mark the request as cancelled. Has no effect on a finished request."""
        self.cancelled = True
        self.future.cancel()

    def set_result(self, result: Completion | BaseException) -> None:
        """Complete the future with a result or an error, unless it was cancelled."""
        try:
            if isinstance(result, BaseException):
                self.future.set_exception(for_future(result))
            else:
                self.future.set_result(result)
        except InvalidStateError:
            self.cancelled = True

    def start(self, update: RetrievedUpdate) -> None:
        """Create the row of the decoder; the state of the bank is that of the update.

        Raises:
            ContextLengthError: If the question exceeds the model's context.
        """
        bank = self.answerer.gradient_retriever.bank
        self.row = self.answerer.decoding_row(update, self.max_new_tokens, top=self.top)
        self.bank = None if bank is None else bank.commit_record.ids_digest
        self.waited = time.monotonic() - self.arrived
        self.stream = TextStream(self.answerer.prompts, verbatim=self.question.verbatim, stop=self.stop)

    def advance(self) -> bool:
        """Send what the last token has added. Return True if the answer is complete."""
        row, stream = self._started()
        if self.first_token is None:
            self.first_token = time.monotonic() - self.arrived
        done = row.finished
        if self.listener is None and not self.stop:
            return done
        part = stream.push(self.answerer.text_tokens(row.tokens), last=done)
        probabilities = tuple(row.probabilities[self.sent :])
        self.sent = len(row.probabilities)
        if self.listener is not None and (part or probabilities):
            try:
                self.listener(Delta(part, probabilities))
            except RuntimeError:  # the event loop is closed
                self.cancelled = True
        return done or stream.stopped

    def completion(self) -> Completion:
        """Return the answer of a complete row."""
        row, stream = self._started()
        answer = self.answerer.decoded(row)
        text, stopped = stream.final(answer.generated)
        complete = stopped or (bool(row.tokens) and row.tokens[-1] in row.ends)
        return Completion(
            replace(answer, text=text), self.waited, self.first_token or 0.0, len(row.prompt), complete, self.bank
        )

    def _started(self) -> tuple[DecodingRow, TextStream]:
        if self.row is None or self.stream is None:
            raise AssertionError("unreachable: requests are started before they join the batch")
        return self.row, self.stream


Actions = deque[tuple[Callable[[], Any], Future[Any]]]
"""Actions that wait for a thread, each with the future of its result."""


def enqueue(waiting: Actions, action: Callable[[], Result], limit: int) -> Future[Result]:
    """Add an action to those that wait; the caller holds the lock of the queue.

    Args:
        waiting: Actions that wait.
        action: The action.
        limit: Maximum number of waiting actions.

    Raises:
        BusyError: If too many are waiting.
    """
    if len(waiting) >= limit:
        raise BusyError(f"Found {len(waiting)} changes waiting; expected fewer. Ask again later.")
    future: Future[Result] = Future()
    waiting.append((action, future))
    return future


def reject_all(waiting: Actions, error: Exception) -> None:
    """Fail all actions that wait; the caller holds the lock of the queue."""
    for _, future in waiting:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
    waiting.clear()


def run_action(action: Callable[[], Any], future: Future[Any]) -> None:
    """Run an action, unless its future was cancelled, and set the result of the future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = action()
    except BaseException as error:
        future.set_exception(for_future(error))
    else:
        future.set_result(result)


def for_future(error: BaseException) -> Exception:
    """The error itself, or one that asyncio can deliver, which treats CancelledError and StopIteration as its own."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    name = type(error).__name__
    found = ModelThreadError(
        f"Found {name} on a thread of the server ({first_line(error)}). The server goes on; ask again."
    )
    found.__cause__ = error
    return found
