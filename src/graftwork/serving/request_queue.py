"""The line of requests and the one thread that owns the model: what waits together is answered together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.text.requests import Answer, Question, Recalled
    from graftwork.serving.settings import ServeSettings
    from graftwork.serving.telemetry import Measures

Result = TypeVar("Result")


class BusyError(GraftworkError, RuntimeError):
    """The line is full."""


class UnavailableError(GraftworkError, RuntimeError):
    """Nothing is answered any more."""


@dataclass(frozen=True, slots=True)
class Served:
    """An answer, with what the server knows of it."""

    answer: Answer
    waited: float
    """Seconds in the line."""
    prompt_tokens: int
    complete: bool
    """Whether the answer ended by itself."""
    bank: str | None
    """What names the bank's contents at that moment."""


@dataclass(slots=True, eq=False)
class Pending:
    """A question in the line, or at work."""

    question: Question
    max_new_tokens: int
    future: Future[Served] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    given_up: bool = False
    """Nobody waits for the answer any more: it is left out, or broken off before its next token."""

    def give_up(self) -> None:
        """Say that nobody waits for the answer."""
        self.given_up = True
        self.future.cancel()

    def settle(self, result: Served | BaseException) -> None:
        """Hand over what came out of it, if anybody still waits."""
        try:
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)
        except InvalidStateError:
            self.given_up = True


class Line:
    """Takes questions and changes from any thread; one thread of its own does the work.

    Changes of the bank go first. A question is recalled when its batch begins, so it sees every change that was
    finished before it was asked. Questions that ask for different numbers of tokens never share a batch, because the
    room for passages in a prompt depends on it; all else may differ.

    Args:
        answerer: Used by the thread alone.
        settings: Sizes and limits.
        measures: Counts what happens.
    """

    def __init__(self, answerer: Answerer, settings: ServeSettings, measures: Measures) -> None:
        self.answerer, self.settings, self.measures = answerer, settings, measures
        self._questions: deque[Pending] = deque()
        self._changes: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._unchecked = 0
        self._thread = threading.Thread(target=self._work, name="graftwork-model", daemon=True)

    def start(self) -> None:
        """Begin to work; returns once the weights have been looked at for later comparison."""
        self._thread.start()
        self.change(self.answerer.check_weights).result()

    def close(self) -> None:
        """Finish the batch at hand and refuse the rest."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether questions are answered."""
        return self.answerer.healthy and self._thread.is_alive() and not self._closing

    def __len__(self) -> int:
        """Questions that wait."""
        return len(self._questions)

    def ask(self, questions: Sequence[Question], max_new_tokens: int) -> list[Pending]:
        """Put questions into the line, all of them or none.

        Raises:
            BusyError: If there is no room.
            UnavailableError: If nothing is answered any more.
        """
        with self._wake:
            self._check()
            if len(self._questions) + len(questions) > self.settings.queue_size:
                raise BusyError(
                    f"Found {len(self._questions)} questions waiting; expected room for {len(questions)} more among "
                    f"{self.settings.queue_size}. Ask again later."
                )
            pending = [Pending(question, max_new_tokens) for question in questions]
            self._questions.extend(pending)
            self._wake.notify_all()
        return pending

    def change(self, action: Callable[[], Result]) -> Future[Result]:
        """Have something done between two batches by the thread that owns the model.

        Raises:
            BusyError: If too much is to be done already.
        """
        future: Future[Result] = Future()
        with self._wake:
            if len(self._changes) >= self.settings.queue_size:
                raise BusyError(f"Found {len(self._changes)} changes waiting; expected fewer. Ask again later.")
            if self._closing:
                raise _closed()
            self._changes.append((action, future))
            self._wake.notify_all()
        return future

    def _work(self) -> None:
        while not self._closing:
            with self._wake:
                self._wake.wait_for(lambda: self._changes or self._questions or self._closing)
            if self._changes:
                self._carry_out(*self._changes.popleft())
            elif batch := self._gather():
                self._answer_batch(batch)
        self._refuse_rest()

    def _gather(self) -> list[Pending]:
        """The questions of the next batch: the first that waits, and those that may go with it."""
        size = self.settings.batch_size
        with self._wake:
            while self._questions and self._questions[0].given_up:
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
            batch: list[Pending] = []
            others: list[Pending] = []
            for one in self._questions:
                fits = one.max_new_tokens == tokens and len(batch) < size
                if not one.given_up:
                    (batch if fits else others).append(one)
            self._questions = deque(others)
        return batch

    def _answer_batch(self, batch: Sequence[Pending]) -> None:
        began = time.monotonic()
        ready: list[tuple[Pending, Recalled, int]] = []
        for one in batch:
            # what is wrong with one question must not touch the others
            try:
                recalled = self.answerer.recall([one.question])[0]
                length = len(self.answerer.prompts(one.question, recalled.hits, one.max_new_tokens))
                ready.append((one, recalled, length))
            except Exception as error:
                one.settle(error)
        bank = self.answerer.recall.bank
        state = None if bank is None else bank.commit_record.ids_digest
        if not ready:
            return
        try:
            answers: Sequence[Answer | Exception] = self._generate(ready)
        except Exception as error:
            answers = [error] if len(ready) == 1 else [self._alone(row) for row in ready]
        self._unchecked += len(ready)
        if self._unchecked >= self.settings.check_every:
            self._unchecked = 0
            # before these answers go out
            self.answerer.check_weights()
        if not self.answerer.healthy:
            answers = [unhealthy()] * len(ready)
        self.measures.batch.observe(len(ready))
        for (one, _, length), answer in zip(ready, answers, strict=True):
            if isinstance(answer, Exception):
                one.settle(answer)
                continue
            self.measures.tokens.inc(answer.tokens)
            one.settle(Served(answer, began - one.arrived, length, self._ended(answer, one.max_new_tokens), state))

    def _generate(self, rows: Sequence[tuple[Pending, Recalled, int]]) -> list[Answer]:
        return self.answerer.generate(
            [recalled for _, recalled, _ in rows],
            max_new_tokens=rows[0][0].max_new_tokens,
            cancelled=lambda number: rows[number][0].given_up,
        )

    def _alone(self, row: tuple[Pending, Recalled, int]) -> Answer | Exception:
        """One row of a batch that failed, by itself, so that only the row that is to blame fails."""
        try:
            return self._generate([row])[0]
        except Exception as error:
            return error

    def _ended(self, answer: Answer, max_new_tokens: int) -> bool:
        """Whether something other than the limit ended an answer."""
        last = answer.generated[-1] if answer.generated else None
        return (
            answer.tokens < max_new_tokens
            or len(answer.generated) < answer.tokens
            or last in self.answerer.prompts.ends
        )

    def _carry_out(self, action: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    def _refuse_rest(self) -> None:
        with self._wake:
            for one in self._questions:
                one.settle(_closed())
            for _, future in self._changes:
                if future.set_running_or_notify_cancel():
                    future.set_exception(_closed())
            self._questions.clear()
            self._changes.clear()

    def _check(self) -> None:
        if not self.answerer.healthy:
            raise unhealthy()
        if not self.healthy:
            raise _closed()


def unhealthy() -> UnavailableError:
    """What is said once the weights were found to have changed."""
    return UnavailableError(
        "Found weights that differ from those at the start; nothing more is answered. Start the server again."
    )


def _closed() -> UnavailableError:
    return UnavailableError("The server is closing; nothing more is answered. Ask it again once it is back.")
