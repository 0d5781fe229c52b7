"""Progress of long computations on stderr; stdout is reserved for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 15.0
"""Seconds between two progress lines if stderr is not a terminal."""

_whole: list[Stages] = []
"""Progress of a sequence of stages, which replaces the progress of the stages; at most one."""


class Progress:
    """Progress bar if stderr is a terminal, periodic lines otherwise.

    Args:
        text: Description of the work.
        total: Number of steps; 0 if unknown.
    """

    def __init__(self, text: str, total: int) -> None:
        self.text = text
        self.total = total
        self.done = 0
        self._bar: Any = None
        self._task: Any = None
        self._last_line = 0.0
        self._started = 0.0

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if _whole and _whole[0] is not self:
            return self
        if sys.stderr.isatty() and self.total > 0:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                *([] if isinstance(self, Stages) else [MofNCompleteColumn()]),
                TimeElapsedColumn(),
                *([] if isinstance(self, Stages) else [TimeRemainingColumn()]),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.text, total=self.total)
        return self

    def advance(self, count: int) -> None:
        """Count `count` more steps as done."""
        self.done += count
        if _whole and _whole[0] is not self:
            _whole[0].inner(self)
        elif self._bar is not None:
            self._bar.update(self._task, advance=count)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            elapsed = self._last_line - self._started
            left = elapsed / max(self.done, 1) * (self.total - self.done)
            rest = (
                f" of {self.total}, about {left:.0f} s left" if self.total else f", {self.done / elapsed:.0f} a second"
            )
            print(f"{self.text}: {self.done}{rest}", file=sys.stderr, flush=True)

    def describe(self, text: str) -> None:
        """Change the description."""
        self.text = text
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class Stages(Progress):
    """One progress line of several stages of known duration; the progress of a stage appears in it as a percentage.

    Args:
        seconds: Expected seconds of every stage. The remaining time is scaled by the measured time of finished stages.
    """

    def __init__(self, seconds: Sequence[float]) -> None:
        super().__init__("", total=max(1, round(sum(seconds))))
        self.seconds = seconds
        self.number = 0
        self._share = 0.0
        self._spent = 0.0
        self._expected = 0.0
        self._stage_started = 0.0

    def __enter__(self) -> Stages:
        super().__enter__()
        # the first line appears at once
        self._last_line = 0.0
        _whole.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _whole.remove(self)
        super().__exit__(kind, value, trace)

    def start(self, text: str) -> None:
        """Start the next stage."""
        self._stage_started, self._share = time.monotonic(), 0.0
        self.describe(text)
        self._show()

    def finish(self, *, skipped: bool = False) -> None:
        """Finish the stage; a skipped one does not count for the scale of the remaining time."""
        if not skipped:
            self._spent += time.monotonic() - self._stage_started
            self._expected += self.seconds[self.number]
        self.number += 1
        self._share = 0.0

    def inner(self, progress: Progress) -> None:
        """Take over the progress of something inside the stage."""
        self._share = min(1.0, progress.done / progress.total) if progress.total else 0.0
        self._show()

    @property
    def left(self) -> float:
        """Expected seconds until all stages are finished."""
        scale = self._spent / self._expected if self._expected else 1.0
        current = self.seconds[self.number] if self.number < len(self.seconds) else 0.0
        spent = time.monotonic() - self._stage_started
        return scale * sum(self.seconds[self.number + 1 :]) + max(0.0, scale * current - spent)

    def _show(self) -> None:
        inside = f", {self._share:.0%}" if self._share else ""
        words = f"[{self.number + 1}/{len(self.seconds)}] {self.text}{inside}, about {self.left:.0f} s left"
        now = time.monotonic()
        if self._bar is not None:
            done = (
                sum(self.seconds[: self.number]) + self._share * self.seconds[min(self.number, len(self.seconds) - 1)]
            )
            self._bar.update(self._task, description=words, completed=done)
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            print(words, file=sys.stderr, flush=True)
