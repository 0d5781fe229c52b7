"""Updates written into the adapter's parameters and restored, for engines that read parameters only."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.errors import GraftworkError
from graftwork.methods.regrad.answering.digests import tensors_digest, weights_digest
from graftwork.methods.regrad.modules import adapters, layout


class WeightsChangedError(GraftworkError, RuntimeError):
    """Weights differ from those at the start; the model must not answer any more."""


class NestedUpdateError(GraftworkError, RuntimeError):
    """A thread requested an update while it was holding another one."""


class InPlaceUpdater:
    """Writes one update at a time into a model's adapter, and restores the adapter bit for bit. Thread-safe.

    The adapter is copied once, in the constructor, and always restored from this copy.

    Args:
        model: The converted model, without any update.
        check_every: Number of restorations between two checks of all weights and buffers; the adapter itself is checked
            after every restoration.
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
    def applied(self, delta: Float[Tensor, " numbers"] | None) -> Generator[None]:
        """Hold an update in the adapter; other threads wait for the lock.

        Args:
            delta: Flat update [numbers] in the order of the layout; None for no update.

        Raises:
            NestedUpdateError: If this thread is holding an update already.
            WeightsChangedError: If the adapter could not be restored, now or earlier.
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
        parts = layout(self.model).split(delta)  # [numbers] -> one tensor of the parameter's shape each
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.add_(parts[name].to(tensor))

    def _restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._snapshot[name])
        self._restored += 1
        unchanged = tensors_digest(self._tensors) == self._digest
        if unchanged and self._restored % self.check_every == 0:
            unchanged = weights_digest(self.model) == self._whole
        if not unchanged:
            self.healthy = False
        self._check_health()

    def _check_health(self) -> None:
        if not self.healthy:
            raise WeightsChangedError(
                "Found weights that differ from those at the start; expected them to be restored bit for bit. The "
                "model no longer answers. Load the model again."
            )


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by their names in the layout."""
    return {
        f"{path}.{name}": adapter.get_parameter(name)
        for path, adapter in adapters(model).items()
        for name in ("lora_A", "lora_B")
    }
