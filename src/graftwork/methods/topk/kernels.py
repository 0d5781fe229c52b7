"""Products with matrices that have k non-zeros per row, and the choice of an implementation per device.

On a CPU with few kept entries, embedding bags and sampled products read only the kept table rows. With many kept
entries, or on a GPU, entries are scattered into a dense matrix and multiplied densely (the choice for GPUs is not
measured). A custom kernel would be another subclass of `Entries`, chosen in `entries_of`.

Notation: S is a sparse [rows keys] matrix with values `weights` at `positions`, both [rows kept].
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.metrics.fake_tensors import is_fake

SPARSE_SHARE = 1 / 8
"""Share of kept entries up to which sparse products are faster than dense ones on a CPU."""


def prefers_dense(kept: int | None, keys: int, device: torch.device) -> bool:
    """Return True if dense products are faster for `kept` of `keys` entries per row; None keeps all entries."""
    return kept is None or device.type != "cpu" or kept > SPARSE_SHARE * keys


class Entries(ABC):
    """Sparsity pattern of a batch of [rows keys] matrices S, with the three products that top-k layers need.

    `weights` has one value per position, `table` one row per key, and `left` one row per row of S.
    """

    @abstractmethod
    def products(
        self, left: Float[Tensor, "*batch rows width"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows kept"]:
        """Compute (left · tableᵀ) at the positions: p_ij = left_i · table_{pos(i,j)}."""

    @abstractmethod
    def weighted(
        self, weights: Float[Tensor, "*batch rows kept"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows width"]:
        """Compute S · table: o_i = Σ_j weights_ij · table_{pos(i,j)}."""

    @abstractmethod
    def collect(
        self, weights: Float[Tensor, "*batch rows kept"], left: Float[Tensor, "*batch rows width"]
    ) -> Float[Tensor, "*batch keys width"]:
        """Compute Sᵀ · left: c_m = Σ_{i,j: pos(i,j)=m} weights_ij · left_i."""


class AllEntries(Entries):
    """Dense S: positions 0 … keys − 1 in every row."""

    def products(
        self, left: Float[Tensor, "*batch rows width"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows keys"]:
        """Multiply left by the transposed table."""
        return left.to(table.dtype) @ table.mT

    def weighted(
        self, weights: Float[Tensor, "*batch rows keys"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows width"]:
        """Multiply the weights by the table."""
        return weights.to(table.dtype) @ table

    def collect(
        self, weights: Float[Tensor, "*batch rows keys"], left: Float[Tensor, "*batch rows width"]
    ) -> Float[Tensor, "*batch keys width"]:
        """Multiply the transposed weights by left."""
        return weights.to(left.dtype).mT @ left


class ScatteredEntries(Entries):
    """S scattered into one reused dense [rows keys] buffer.

    Args:
        index: Distinct key positions of every row.
        keys: Number of keys.
        buffer: Memory to reuse, [*batch rows keys]; its contents are lost.
    """

    def __init__(self, index: Int[Tensor, "*batch rows kept"], keys: int, buffer: Tensor | None = None) -> None:
        self.index = index.long()
        self.keys = keys
        self._buffer = None if buffer is None else buffer.zero_()
        self._held: Tensor | None = None

    def products(
        self, left: Float[Tensor, "*batch rows width"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows kept"]:
        """Multiply densely, then gather at the positions."""
        return (left.to(table.dtype) @ table.mT).gather(-1, self.index)  # [*batch, rows, keys] → [*batch, rows, kept]

    def weighted(
        self, weights: Float[Tensor, "*batch rows kept"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows width"]:
        """Scatter, then multiply."""
        return self._scattered(weights, table.dtype) @ table

    def collect(
        self, weights: Float[Tensor, "*batch rows kept"], left: Float[Tensor, "*batch rows width"]
    ) -> Float[Tensor, "*batch keys width"]:
        """Scatter, transpose, then multiply."""
        return self._scattered(weights, left.dtype).mT @ left

    def _scattered(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        if self._buffer is None or self._buffer.dtype != dtype:
            self._buffer, self._held = weights.new_zeros((*self.index.shape[:-1], self.keys), dtype=dtype), None
        if self._held is not weights:
            # the positions never change, so every earlier value is overwritten
            self._buffer.scatter_(-1, self.index, weights.to(dtype))
            self._held = weights
        return self._buffer


class SparseEntries(Entries):
    """S as a sparse matrix: only the table rows at the positions are read and written.

    The batch is flattened into one long table of batch·keys rows, to which positions are offset.

    Args:
        index: Distinct key positions of every row.
        keys: Number of keys.
    """

    def __init__(self, index: Int[Tensor, "*batch rows kept"], keys: int) -> None:
        self.shape = index.shape
        batch = index.shape[:-2].numel()
        self.keys = batch * keys
        index = index.reshape(batch, -1).int()  # [batch, rows·kept]
        if batch > 1:
            offset = torch.arange(0, self.keys, keys, dtype=torch.int32, device=index.device)
            index = index + offset[:, None]  # [batch, 1] broadcast to [batch, rows·kept]
        self.index = index.reshape(-1, self.shape[-1])  # [batch·rows, kept]

    def products(
        self, left: Float[Tensor, "*batch rows width"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows kept"]:
        """Compute only the products at the positions, by a sampled matrix product."""
        rows, kept = self.index.shape
        if is_fake(left):
            # torch has no fake CSR tensors; the sampled product allocates the pattern and its result
            pattern = left.new_zeros(rows * kept), self.index.new_empty(rows + 1)
            return left.new_empty(pattern[0].shape).view(self.shape)  # [*batch, rows, kept]
        _silence_sparse_beta()
        sparse: Any = torch.sparse
        pattern = torch.sparse_csr_tensor(  # pyright: ignore[reportUnknownMemberType]
            torch.arange(0, rows * kept + 1, kept, dtype=torch.int32, device=left.device),
            self.index.reshape(-1),  # [batch·rows·kept]
            left.new_zeros(rows * kept),
            (rows, self.keys),
            check_invariants=False,
        )
        # [batch·rows, width] · [width, batch·keys], sampled at batch·rows·kept entries
        values: Tensor = sparse.sampled_addmm(pattern, _flat(left), _flat(table).t(), beta=0.0).values()
        return values.view(self.shape)  # [*batch, rows, kept]

    def weighted(
        self, weights: Float[Tensor, "*batch rows kept"], table: Float[Tensor, "*batch keys width"]
    ) -> Float[Tensor, "*batch rows width"]:
        """Sum the table rows of each bag of positions."""
        bags = F.embedding_bag(
            self.index,
            _flat(table),  # [batch·keys, width]
            mode="sum",
            per_sample_weights=weights.reshape(self.index.shape),  # [batch·rows, kept]
        )
        return bags.view(*self.shape[:-1], -1)  # [*batch, rows, width]

    def collect(
        self, weights: Float[Tensor, "*batch rows kept"], left: Float[Tensor, "*batch rows width"]
    ) -> Float[Tensor, "*batch keys width"]:
        """Sum the rows of left key by key: deterministic order of summation, one write per key."""
        entry, row, start = self._by_key
        bags = F.embedding_bag(
            row,
            _flat(left),  # [batch·rows, width]
            start,
            mode="sum",
            per_sample_weights=weights.reshape(-1).index_select(0, entry),  # [batch·rows·kept], sorted by key
        )
        return bags.view(*self.shape[:-2], -1, left.shape[-1])  # [*batch, keys, width]

    @cached_property
    def _by_key(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries sorted by key: entry number and row [batch·rows·kept], and first entry of each key [batch·keys]."""
        flat = self.index.reshape(-1)  # [batch·rows·kept]
        # int16 sorts several times faster than int32
        ordered, entry = (flat.short() if self.keys <= torch.iinfo(torch.int16).max else flat).sort(stable=True)
        start = torch.searchsorted(ordered, torch.arange(self.keys, dtype=ordered.dtype, device=ordered.device))
        return entry, entry // self.shape[-1], start


def entries_of(
    index: Int[Tensor, "*batch rows kept"] | None, keys: int, buffer: Float[Tensor, "*batch rows keys"] | None = None
) -> Entries:
    """Choose the implementation of the products for the given positions.

    Args:
        index: Distinct key positions of every row; None for all positions.
        keys: Number of keys (table rows).
        buffer: Memory that dense products may overwrite.
    """
    if index is None:
        return AllEntries()
    if prefers_dense(index.shape[-1], keys, index.device):
        return ScatteredEntries(index, keys, buffer)
    return SparseEntries(index, keys)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])  # [*batch, rows, width] → [batch·rows, width]


@cache
def _silence_sparse_beta() -> None:
    # torch warns once per process that CSR tensors are in beta; users cannot act on it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = torch.tensor([0, 1])
        torch.sparse_csr_tensor(  # pyright: ignore[reportUnknownMemberType]
            start, start[:1], torch.zeros(1), (1, 1), check_invariants=False
        )
