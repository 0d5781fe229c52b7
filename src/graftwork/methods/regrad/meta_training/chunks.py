"""Chunks of passages: the number of passages that meta-training differentiates at once."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from graftwork.methods.regrad.meta_training.learning import Batch, Chunk, differentiate, hessian_products
from graftwork.metrics.fake_tensors import fake_tensors, is_fake
from graftwork.metrics.memory import MemoryRecorder
from graftwork.surgery.sites import pretrained

logger = logging.getLogger(__name__)

CHUNK_MEMORY = {"cpu": 128 * 10**6}
"""Bytes of one chunk with `meta_chunk="auto"`, by type of device. One passage keeps the cores of a CPU busy, so that
larger chunks would need memory without being faster."""
ACCELERATOR_MEMORY = 4 * 10**9
"""The same for all other devices."""
TOKENS_STEP = 64
"""Lengths are rounded up to multiples of this number of tokens, which limits the number of estimates."""


class Chunks:
    """Divides the passages of a batch into chunks.

    With a number, every chunk has that many passages. With `auto`, a chunk has as many as need at most `CHUNK_MEMORY`,
    at least one. Their memory is estimated: the real code runs on fake tensors, once for each length. The chunks depend
    on the model, the lengths of the passages and the type of the device only, so that a resumed training has those of
    an uninterrupted one.

    Passages are sorted by length, so that short ones need no padding to the longest one of the batch.

    Args:
        size: Number of passages of a chunk, `auto`, or `all` for a single chunk.
        order: Order of the meta-gradient.
    """

    def __init__(self, size: int | Literal["auto", "all"], order: int) -> None:
        self.size, self.order = size, order
        self._bytes: dict[int, int] = {}

    def of(self, model: nn.Module, batch: Batch) -> list[Chunk] | None:
        """Return the chunks of a batch; None for a single one.

        Args:
            model: The converted model, in the mode in which it is trained.
            batch: Result of `EpisodeCollator`.
        """
        count, tokens = batch["document_ids"].shape
        if count <= self._fitting(model, tokens, count):
            return None
        fake = is_fake(batch["document_mask"])
        sums: Any = batch["document_mask"].sum(-1)  # [passages]
        lengths: list[int] = [tokens] * count if fake else sums.tolist()
        order = sorted(range(count), key=lambda row: -lengths[row])
        chunks: list[Chunk] = []
        while order:
            longest = max(1, lengths[order[0]])
            size = self._fitting(model, longest, len(order))
            chunks.append(Chunk(sorted(order[:size]), longest))
            order = order[size:]
        return _distinct(chunks) if fake else chunks

    def _fitting(self, model: nn.Module, tokens: int, count: int) -> int:
        """Number of passages of a length in one chunk, at most `count`."""
        if self.size == "all" or count == 1:
            return count
        if isinstance(self.size, int):
            return min(self.size, count)
        rounded = -(-tokens // TOKENS_STEP) * TOKENS_STEP
        if rounded not in self._bytes:
            self._bytes[rounded] = _estimated(model, rounded, self.order)
        room = CHUNK_MEMORY.get(pretrained(model).device.type, ACCELERATOR_MEMORY)
        return min(count, max(1, room // self._bytes[rounded]))


def passage_bytes(model: nn.Module, tokens: int, order: int) -> int:
    """Peak memory of the gradient of one passage, with order 2 also of its Hessian-vector product.

    Args:
        model: The converted model, with or without values.
        tokens: Number of tokens.
        order: Order of the meta-gradient.
    """
    if any(is_fake(parameter) for parameter in model.parameters()):
        return _peak(model, tokens, order)
    with _unchanged(model), fake_tensors(real_inputs=True):
        found = _peak(model, tokens, order)
    # casts of fake tensors must not be used by real ones
    torch.clear_autocast_cache()
    return found


def _peak(model: nn.Module, tokens: int, order: int) -> int:
    with MemoryRecorder() as recorder:
        # views of the weights are no new memory
        weights = [each.detach() for each in (*model.parameters(), *model.buffers())]
        before = recorder.live_bytes
        recorder.reset_peak()
        _differentiate_once(model, tokens, order)
        del weights
        return recorder.peak_bytes - before


def _differentiate_once(model: nn.Module, tokens: int, order: int) -> None:
    ids = torch.ones(1, tokens, dtype=torch.long, device=pretrained(model).device)
    found = differentiate(model, ids, torch.ones_like(ids), create_graph=order == 2)
    if order == 2:
        hessian_products(model, found, torch.ones_like(found.displacements))


def _estimated(model: nn.Module, tokens: int, order: int) -> int:
    try:
        return max(1, passage_bytes(model, tokens, order))
    # an estimate must never prevent a training
    except Exception as error:
        logger.debug("The estimate of a passage's memory failed.", exc_info=True)
        logger.warning(
            "The memory of a passage could not be estimated (%s); passages are differentiated one after the other. Set "
            "method.meta_chunk to a number to choose.",
            type(error).__name__,
        )
        return 1 << 62


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Restore attributes and buffers of all modules, which some models replace in the forward pass."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        attributes = module.__dict__
        kept += [(each, dict(each)) for each in (attributes, attributes["_buffers"])]
    try:
        yield
    finally:
        for changed, before in kept:
            changed.clear()
            changed.update(before)


def _distinct(chunks: Sequence[Chunk]) -> list[Chunk]:
    """One chunk of every shape: on fake tensors, equal shapes need equal memory."""
    return list({(len(chunk.rows), chunk.tokens): chunk for chunk in chunks}.values())
