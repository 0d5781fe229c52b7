"""Grouped commits of encoded batches, and the counts of an encoding run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.core.progress import Progress
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import Appended, Gradient

COMMIT_SECONDS = 15.0
"""Longest time that a finished gradient waits for its commit."""
COMMIT_BYTES = 256 << 20
"""Size of uncommitted gradients that triggers a commit."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Encoded:
    """Counts and speed of an encoding run."""

    written: int = 0
    """Gradients computed and stored."""
    aliased: int = 0
    """New ids of texts that already had a gradient."""
    skipped: int = 0
    """Ids that already had a gradient."""
    replaced: int = 0
    """Ids that referred to another text before."""
    rejected: int = 0
    """Passages that cannot be encoded."""
    reasons: tuple[str, ...] = ()
    """Reasons for the first rejections."""
    tokens: int = 0
    seconds: float = 0.0
    passages_per_second: float = 0.0
    bytes_per_second: float = 0.0


class BankWriter:
    """Buffers gradients and commits them in groups of whole batches.

    Args:
        bank: Bank that receives them; open for writing.
        replace: Let existing ids refer to their new texts.
        progress: Advanced for every committed passage.
    """

    def __init__(self, bank: GradientBank, *, replace: bool = False, progress: Progress | None = None) -> None:
        self.bank, self.replace, self.progress = bank, replace, progress
        self.total, self.tokens, self.rejected = Appended(), 0, 0
        self.reasons: list[str] = []
        self._waiting: list[Gradient] = []
        self._started = self._committed = time.monotonic()

    def add(self, gradients: Sequence[Gradient]) -> None:
        """Buffer a batch, and commit the buffer if it is large or old enough."""
        self._waiting += gradients
        self.tokens += sum(gradient.tokens for gradient in gradients)
        size = len(self._waiting) * self.bank.manifest.stride
        if size >= COMMIT_BYTES or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def skip(self, count: int) -> None:
        """Count passages that already have a gradient."""
        self.total = _plus(self.total, Appended(skipped=count))

    def reject(self, reason: str) -> None:
        """Count a passage that cannot be encoded."""
        self.rejected += 1
        if len(self.reasons) < _SHOWN:
            self.reasons.append(reason)

    def commit(self) -> None:
        """Commit the buffer; everything added so far is durable afterwards."""
        if self._waiting:
            self.total = _plus(self.total, self.bank.append(self._waiting, replace=self.replace))
            if self.progress is not None:
                done = self.result()
                self.progress.describe(
                    f"encode ({done.passages_per_second:.0f} passages/s, {done.bytes_per_second / 1e6:.2f} MB/s)"
                )
                self.progress.advance(len(self._waiting))
        self._waiting, self._committed = [], time.monotonic()

    def result(self) -> Encoded:
        """Return the counts so far."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        count = self.total.written
        return Encoded(
            count,
            self.total.aliased,
            self.total.skipped,
            self.total.replaced,
            self.rejected,
            tuple(self.reasons),
            self.tokens,
            round(seconds, 3),
            round(count / seconds, 2),
            round(count * self.bank.manifest.stride / seconds),
        )


def _plus(one: Appended, other: Appended) -> Appended:
    return Appended(
        one.written + other.written,
        one.aliased + other.aliased,
        one.skipped + other.skipped,
        one.replaced + other.replaced,
    )
