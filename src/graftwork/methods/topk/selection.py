"""Exact selection of the k largest scores, and the blocks of rows in which scores are made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftwork.errors import ConfigError

SCORE_BUDGET = 1 << 22
"""Scores of hidden units that may exist at once, in numbers; a block has at least one row all the same."""

ENTRY_BUDGET = 1 << 20
"""Kept entries that a backward pass looks at together, in numbers."""

INT16_LIMIT = torch.iinfo(torch.int16).max


def select_topk(
    scores: Float[Tensor, "*rows keys"], k: int
) -> tuple[Float[Tensor, "*rows kept"], Int[Tensor, "*rows kept"]]:
    """Find the k largest scores of every row, in no particular order.

    A long row is cut into groups. Every one of the k largest scores lies in one of the k groups with the largest
    maxima, because each better group holds at least one better score. So the search runs over the maxima and then over
    k groups, which is exact, ties included (any k of them), and not-a-number counts as largest throughout.

    Args:
        scores: Any floating dtype.
        k: Entries to find; clamped to the length of the row.

    Returns:
        The scores found and their int64 positions.

    Raises:
        ConfigError: If `k` is smaller than 1.

    Example:
        >>> values, indices = select_topk(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        >>> sorted(indices[0].tolist())
        [0, 2]
    """
    check_k(k)
    keys = scores.shape[-1]
    k = min(k, keys)
    if k == keys:
        return scores, torch.arange(keys, device=scores.device).expand(scores.shape)
    size = _group_size(keys, k, scores.device)
    if size == 1:
        return scores.topk(k, dim=-1, sorted=False)
    groups = keys // size
    whole = groups * size
    # strided groups {g, g + groups, …} make the maximum a vector operation over neighbours
    maxima = scores[..., :whole].unflatten(-1, (size, groups)).amax(-2)
    best = maxima.topk(k, dim=-1, sorted=False).indices
    steps = torch.arange(0, whole, groups, device=scores.device)
    candidates = (best.unsqueeze(-2) + steps[:, None]).flatten(-2)
    if whole < keys:
        rest = torch.arange(whole, keys, device=scores.device)
        candidates = torch.cat([candidates, rest.expand(*candidates.shape[:-1], -1)], dim=-1)
    values, positions = scores.gather(-1, candidates).topk(k, dim=-1, sorted=False)
    return values, candidates.gather(-1, positions)


def _group_size(keys: int, k: int, device: torch.device) -> int:
    # on a CPU, groups pay where they leave few candidates; a GPU's selection has other costs and is left to the library
    if device.type != "cpu" or keys < 16 * k or keys < 1024:
        return 1
    return 8 if keys >= 32 * k else 4


def check_k(k: int | None) -> None:
    """Refuse a k that keeps nothing.

    Raises:
        ConfigError: If `k` is smaller than 1.
    """
    if k is not None and k < 1:
        raise ConfigError(f"k is {k}. Expected a whole number from 1. To keep all scores, set k to None.")


def check_chunk_size(chunk_size: int | None) -> None:
    """Refuse a chunk that holds nothing.

    Raises:
        ConfigError: If `chunk_size` is smaller than 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(
            f"chunk_size is {chunk_size}. Expected a whole number from 1. To choose it by size, set it to None."
        )


def check_dropout(dropout: float) -> None:
    """Refuse a rate that is no probability, or that drops all.

    Raises:
        ConfigError: If `dropout` is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}. Expected a rate from 0 up to, but not, 1. Set it to 0 for none.")


def row_blocks(rows: int, width: int, chunk_size: int | None, budget: int = SCORE_BUDGET) -> Iterator[tuple[int, int]]:
    """Cut rows into nearly equal blocks of at most `chunk_size` rows and, beyond one row, `budget` numbers.

    Source: the required rule of ceil(rows / chunk_size) chunks; the authors' floor let chunks grow to twice the size.

    Args:
        rows: Rows to cover.
        width: Numbers per row.
        chunk_size: Upper bound on the rows of a block; None leaves only the budget.
        budget: Upper bound on the numbers of a block.

    Yields:
        First row of a block and one past its last.

    Example:
        >>> list(row_blocks(10, 1, 4))
        [(0, 4), (4, 8), (8, 10)]
    """
    size = max(1, budget // max(1, width))
    if chunk_size is not None:
        size = min(size, chunk_size)
    # blocks of nearly the same size let an allocator give each the memory of the one before
    size = -(-rows // max(1, -(-rows // size))) or 1
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def index_dtype(keys: int) -> torch.dtype:
    """The narrowest integer type that can hold a key position."""
    return torch.int16 if keys - 1 <= INT16_LIMIT else torch.int32


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which softmax, activations and sums are done: single precision for half, else as it is."""
    return torch.promote_types(dtype, torch.float32)
