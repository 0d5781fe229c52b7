"""Products with matrices that have k non-zeros per row, and the choice of how to compute them on a device.

On the CPU, embedding bags and sampled products touch only the table rows that were kept. Where many are kept, or on a
GPU, whose dense products outrun its gathers, the entries are scattered and multiplied densely; the GPU's choice is not
measured yet. A kernel of our own would be one more subclass of `Entries`, chosen in `entries_of`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import cache, cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

SPARSE_SHARE = 1 / 8
"""Share of kept entries up to which sparse products are the faster ones on a CPU."""


def prefers_dense(kept: int | None, keys: int, device: torch.device) -> bool:
    """Say whether dense products are the faster way for `kept` of `keys` entries per row; None keeps all."""
    return kept is None or device.type != "cpu" or kept > SPARSE_SHARE * keys


class Entries(ABC):
    """Positions of a batch of matrices, queries × keys, at which they may be other than zero.

    Weights are a number per position. Tables have a row per key; `left` has a row per query.
    """

    @abstractmethod
    def products(
        self, left: Float[Tensor, "*batch rows width"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows kept"]:
        """Dot each row of `left` with the table rows at its positions."""

    @abstractmethod
    def weighted(
        self, weights: Float[Tensor, "*batch rows kept"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows width"]:
        """Sum the table rows at each query's positions, with weights."""

    @abstractmethod
    def collect(
        self, weights: Float[Tensor, "*batch rows kept"], left: Float[Tensor, "*batch rows width"]
    ) -> Float[Tensor, "*batch keys width"]:
        """Sum for each key the rows of `left` that have a position there, with weights."""


class AllEntries(Entries):
    """Every position: ordinary dense products."""

    def products(self, left: Tensor, table: Tensor) -> Tensor:
        """Multiply left by the transposed table."""
        return left.to(table.dtype) @ table.mT

    def weighted(self, weights: Tensor, table: Tensor) -> Tensor:
        """Multiply the weights by the table."""
        return weights.to(table.dtype) @ table

    def collect(self, weights: Tensor, left: Tensor) -> Tensor:
        """Multiply the transposed weights by left."""
        return weights.to(left.dtype).mT @ left


class ScatteredEntries(Entries):
    """A few positions, multiplied as dense matrices through one buffer."""

    def __init__(self, index: Int[Tensor, "*batch rows kept"], keys: int, buffer: Tensor | None = None) -> None:
        self.index = index.long()
        self.keys = keys
        self._buffer = None if buffer is None else buffer.zero_()
        self._held: Tensor | None = None

    def products(self, left: Tensor, table: Tensor) -> Tensor:
        """Multiply densely and pick the positions."""
        return (left.to(table.dtype) @ table.mT).gather(-1, self.index)

    def weighted(self, weights: Tensor, table: Tensor) -> Tensor:
        """Scatter and multiply."""
        return self._scattered(weights, table.dtype) @ table

    def collect(self, weights: Tensor, left: Tensor) -> Tensor:
        """Scatter, transpose and multiply."""
        return self._scattered(weights, left.dtype).mT @ left

    def _scattered(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        if self._buffer is None or self._buffer.dtype != dtype:
            self._buffer, self._held = weights.new_zeros((*self.index.shape[:-1], self.keys), dtype=dtype), None
        if self._held is not weights:
            # the positions are always the same, so what was there is overwritten
            self._buffer.scatter_(-1, self.index, weights.to(dtype))
            self._held = weights
        return self._buffer


class SparseEntries(Entries):
    """A few positions, whose table rows alone are read and written."""

    def __init__(self, index: Int[Tensor, "*batch rows kept"], keys: int) -> None:
        self.shape = index.shape
        batch = index.shape[:-2].numel()
        self.keys = batch * keys
        index = index.reshape(batch, -1).int()
        if batch > 1:
            # one long table for the whole batch
            index = index + torch.arange(0, self.keys, keys, dtype=torch.int32, device=index.device)[:, None]
        self.index = index.reshape(-1, self.shape[-1])

    def products(self, left: Tensor, table: Tensor) -> Tensor:
        """Compute the wanted products only."""
        _silence_sparse_beta()
        rows, kept = self.index.shape
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, rows * kept + 1, kept, dtype=torch.int32, device=left.device),
            self.index.reshape(-1),
            left.new_zeros(rows * kept),
            (rows, self.keys),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, _flat(left), _flat(table).t(), beta=0.0).values().view(self.shape)

    def weighted(self, weights: Tensor, table: Tensor) -> Tensor:
        """Bag the wanted rows of the table."""
        bags = F.embedding_bag(
            self.index, _flat(table), mode="sum", per_sample_weights=weights.reshape(self.index.shape)
        )
        return bags.view(*self.shape[:-1], -1)

    def collect(self, weights: Tensor, left: Tensor) -> Tensor:
        """Bag the rows of left key by key: a fixed order of summation, and one write per key."""
        entry, row, start = self._by_key
        bags = F.embedding_bag(
            row, _flat(left), start, mode="sum", per_sample_weights=weights.reshape(-1).index_select(0, entry)
        )
        return bags.view(*self.shape[:-2], -1, left.shape[-1])

    @cached_property
    def _by_key(self) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.index.reshape(-1)
        # a short type sorts several times faster
        ordered, entry = (flat.short() if self.keys <= torch.iinfo(torch.int16).max else flat).sort(stable=True)
        start = torch.searchsorted(ordered, torch.arange(self.keys, dtype=ordered.dtype, device=ordered.device))
        return entry, entry // self.shape[-1], start


def entries_of(
    index: Int[Tensor, "*batch rows kept"] | None, keys: int, buffer: Float[Tensor, "*batch rows keys"] | None = None
) -> Entries:
    """Choose the form of the products for the given positions; None stands for all positions.

    Args:
        index: Distinct key positions of every row.
        keys: Rows of the tables to come.
        buffer: Memory that may be overwritten, should the products be dense.
    """
    if index is None:
        return AllEntries()
    if prefers_dense(index.shape[-1], keys, index.device):
        return ScatteredEntries(index, keys, buffer)
    return SparseEntries(index, keys)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


@cache
def _silence_sparse_beta() -> None:
    # torch says once per process that CSR tensors are in beta; users cannot act on it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = torch.tensor([0, 1])
        torch.sparse_csr_tensor(start, start[:1], torch.zeros(1), (1, 1), check_invariants=False)
