"""Updates of the rows of a batch, computed once for any number of forward passes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graftwork.methods.regrad.modules import adapter_off, layout, row_pairs, using_pairs
from graftwork.surgery.sites import pretrained

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.in_place import InPlaceUpdater
    from graftwork.methods.regrad.text.requests import RetrievedUpdate


class RowUpdates:
    """Adapters of the rows of one batch: row r uses θ + Δ_r, or the pretrained model.

    Args:
        model: The converted model.
        rows: Updates of the rows, with their questions.
        in_place: Writes the update of a single row into the adapter instead; None adds updates in the forward pass.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[RetrievedUpdate], in_place: InPlaceUpdater | None = None
    ) -> None:
        self.model, self.rows, self.in_place = model, rows, in_place
        off = [not row.question.adapter for row in rows]
        self._off = all(off)
        self._pairs = None
        if in_place is None and not self._off and (any(off) or any(row.delta is not None for row in rows)):
            device = pretrained(model).device
            blank = torch.zeros(layout(model).size)
            deltas = torch.stack([blank if row.delta is None else row.delta for row in rows])  # [rows numbers]
            with torch.no_grad():
                self._pairs = row_pairs(model, deltas.to(device), off=torch.tensor(off) if any(off) else None)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Apply the update of every row to the forward passes inside."""
        if self._off:
            scope: AbstractContextManager[Any] = adapter_off(self.model)
        elif self._pairs is not None:
            scope = using_pairs(self._pairs)
        else:
            scope = nullcontext()
        if self.in_place is None:
            with scope:
                yield
            return
        with self.in_place.applied(self.rows[0].delta), scope:
            yield
