"""Changes of a bank and its index on a thread of their own, so that answers go on meanwhile."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from graftwork.core.heap import HeapTrimmer
from graftwork.errors import GraftworkError
from graftwork.serving.queued_request import Actions, enqueue, reject_all, run_action
from graftwork.serving.request_queue import RequestQueue, closed

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.bank.files import CommitRecord
    from graftwork.serving.settings import ServeSettings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_PAUSE = 60.0
"""Longest time between two looks at whether the server is idle, in seconds."""


class ChangeWorker:
    """Thread that adds, deletes, erases and compacts with handles of its own on bank and index. Thread-safe.

    The model thread sees a change as one of another process: the next question is answered from the newest state.
    Updates that are written into the adapter in place exclude encoding, so that changes then run on the model thread.

    Args:
        answerer: Model, bank and index; its own handles are left alone.
        queue: Questions; compaction waits until there are none.
        settings: Queue size, and the idle time before compaction.
    """

    def __init__(self, answerer: Answerer, queue: RequestQueue, settings: ServeSettings) -> None:
        self.answerer = answerer.with_own_handles()
        self._in_place = answerer.in_place is not None
        self.queue, self.settings = queue, settings
        self._waiting: Actions = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._compacted: CommitRecord | None = None
        self._heap = HeapTrimmer()
        self._thread = threading.Thread(target=self._work, name="graftwork-changes", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Finish the current change and reject the others."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, change: Callable[[Answerer], Result]) -> Future[Result]:
        """Run a change; it receives the answerer whose handles it may use.

        Raises:
            BusyError: If too many changes are waiting.
            UnavailableError: If the server is closing.
        """
        with self._wake:
            if self._closing:
                raise closed()
            future = enqueue(self._waiting, lambda: self._run(change), self.settings.queue_size)
            self._wake.notify_all()
        return future

    def _run(self, change: Callable[[Answerer], Result]) -> Result:
        if not self._in_place:
            return change(self.answerer)
        return self.queue.run_between_batches(lambda: change(self.answerer)).result()

    def _work(self) -> None:
        idle = self.settings.compact_after
        while not self._closing:
            with self._wake:
                found = self._wake.wait_for(lambda: self._waiting or self._closing, min(idle, _PAUSE) if idle else None)
                one = self._waiting.popleft() if self._waiting else None
            if one is not None:
                run_action(*one)
                self._heap.release()
            elif not found and self.queue.idle_seconds >= idle:
                self._compact()
                self._heap.release()
        with self._wake:
            reject_all(self._waiting, closed())

    def _compact(self) -> None:
        """Remove the bytes of deleted passages, unless nothing has changed since the last call."""
        bank = self.answerer.gradient_retriever.bank
        if bank is None:
            return
        try:
            self.answerer.gradient_retriever.refresh()
            if bank.commit_record != self._compacted:
                self._run(lambda answerer: answerer.remove_deleted())
                self._compacted = bank.commit_record
        except GraftworkError as error:
            # another writer, a read-only folder or a full disk; questions report errors of bank and index themselves
            logger.warning("Could not compact the bank: %s", error)
