"""Types of encoded data: rows, batches, data sets and collators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Row = Mapping[str, Any]
"""One encoded example: token ids, labels and other columns by name."""

Batch = Mapping[str, Any]
"""Keyword arguments of one forward pass, mostly tensors [batch tokens] by argument name."""

Collator = Callable[[Sequence[Any]], Batch]
"""Makes a batch of encoded rows."""


class EncodedDataset(Protocol):
    """Map-style data set of encoded rows, as `torch.utils.data.Dataset` defines it, with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return one row; the type of the index is that of the sampler's items."""
        ...
