"""Updates written into the adapter and taken back, for engines that read parameters only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftwork.errors import GraftworkError
from graftwork.methods.regrad.answering.digests import tensors_digest, weights_digest
from graftwork.methods.regrad.modules import adapters, layout


class WeightsChangedError(GraftworkError, RuntimeError):
    """Weights are not what they were; nothing may be answered with them any more."""


class NestedUpdateError(GraftworkError, RuntimeError):
    """An update was to be written while another one is."""


class InPlaceUpdater:
    """Writes one update at a time into a model's adapter, and puts back what was there, bit for bit.

    What the adapter must be is copied once, at the start, and never from a model that may carry an update.

    Args:
        model: The converted model, without any update.
        check_every: Restorations between two checks of all weights and buffers; the adapter is checked after each.
    """

    def __init__(self, model: nn.Module, *, check_every: int = 100) -> None:
        self.model, self.check_every = model, check_every
        self.healthy = True
        self._tensors = _adapter_tensors(model)
        self._snapshot = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._digest = tensors_digest(self._tensors)
        self._whole = weights_digest(model)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._restored = 0

    @contextmanager
    def applied(self, delta: Tensor | None) -> Iterator[None]:
        """Hold an update in the adapter; other threads wait for their turn.

        Args:
            delta: What is added, flat, in the order of the layout; None for nothing.

        Raises:
            NestedUpdateError: If this thread holds one already.
            WeightsChangedError: If the adapter cannot be put back as it was, now or earlier.
        """
        if self._owner == threading.get_ident():
            raise NestedUpdateError("Found an update inside another one; expected one at a time. Let the first end.")
        with self._lock:
            self._check_health()
            self._owner = threading.get_ident()
            try:
                self._write(delta)
                yield
            finally:
                self._owner = None
                self._restore()

    def _write(self, delta: Tensor | None) -> None:
        if delta is None:
            return
        parts = layout(self.model).split(delta)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.add_(parts[name].to(tensor))

    def _restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._snapshot[name])
        self._restored += 1
        sound = tensors_digest(self._tensors) == self._digest
        if sound and self._restored % self.check_every == 0:
            sound = weights_digest(self.model) == self._whole
        if not sound:
            self.healthy = False
        self._check_health()

    def _check_health(self) -> None:
        if not self.healthy:
            raise WeightsChangedError(
                "Found weights that differ from those at the start; expected them to be put back bit for bit. Nothing "
                "more is answered. Load the model again."
            )


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by their names in the layout."""
    return {
        f"{path}.{name}": getattr(adapter, name)
        for path, adapter in adapters(model).items()
        for name in ("lora_A", "lora_B")
    }
