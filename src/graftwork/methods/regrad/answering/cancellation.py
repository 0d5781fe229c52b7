"""Cancellation of single rows of a batch that is being generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

IsCancelled = Callable[[int], bool]
"""Callable that returns True if the question at this position of the call is cancelled."""


class CancellationCriterion:
    """Stopping criterion for cancelled rows; `rows` has the number of new tokens of each at that time."""

    def __init__(self, cancelled: IsCancelled, numbers: Sequence[int]) -> None:
        self.cancelled, self.numbers = cancelled, numbers
        self.rows: dict[int, int] = {}
        self._tokens = 0

    def __call__(self, input_ids: Int[Tensor, "rows tokens"], scores: object, **kwargs: object) -> Tensor:
        """Return True for every row that is cancelled."""
        self._tokens += 1
        for row, number in enumerate(self.numbers):
            if row not in self.rows and self.cancelled(number):
                self.rows[row] = self._tokens
        return torch.tensor([row in self.rows for row in range(len(self.numbers))], device=input_ids.device)
