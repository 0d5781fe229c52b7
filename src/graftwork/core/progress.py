"""Progress of long computations on stderr; stdout is reserved for results."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 15.0
"""Seconds between two progress lines if stderr is not a terminal."""


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
        if sys.stderr.isatty() and self.total > 0:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.text, total=self.total)
        return self

    def advance(self, count: int) -> None:
        """Count `count` more steps as done."""
        self.done += count
        if self._bar is not None:
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
