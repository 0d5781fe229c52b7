"""Exact selection of the k largest scores, row blocks for chunked computation, and dtype rules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftwork.errors import ConfigError

SCORE_BUDGET = 1 << 22
"""Maximum number of hidden-unit scores of one block; a block has at least one row even if that exceeds it."""

ENTRY_BUDGET = 1 << 20
"""Maximum number of kept entries per block of a backward pass with sparse products."""

INT16_LIMIT = torch.iinfo(torch.int16).max


def select_topk(
    scores: Float[Tensor, "*rows keys"], k: int
) -> tuple[Float[Tensor, "*rows kept"], Int[Tensor, "*rows kept"]]:
    """Find the k largest scores of every row, in no particular order.

    A long row z of n scores is split into g strided groups, G_j = {z_j, z_{j+g}, z_{j+2g}, …}. Every one of the k
    largest scores belongs to one of the k groups with the largest maxima, because each group with a larger maximum
    contains at least one larger score. The search therefore runs over the g maxima, then over the n·k/g members of the
    chosen groups. The result is exact; ties are broken arbitrarily; NaN counts as the largest value.

    Args:
        scores: Scores of any floating dtype.
        k: Entries to find per row; clamped to the length of the row.

    Returns:
        The selected scores and their int64 positions.

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
    # strided groups, so that the maximum vectorises over neighbours
    grouped = scores[..., :whole].reshape(*scores.shape[:-1], size, groups)  # [*rows, size, groups]
    maxima = grouped.amax(-2)  # [*rows, groups]
    best = maxima.topk(k, dim=-1, sorted=False).indices  # [*rows, k]
    steps = torch.arange(0, whole, groups, device=scores.device)  # [size]
    candidates = (best[..., None, :] + steps[:, None]).flatten(-2)  # [*rows, size, k] → [*rows, size·k]
    if whole < keys:
        rest = torch.arange(whole, keys, device=scores.device)  # [keys − whole]
        candidates = torch.cat([candidates, rest.expand(*candidates.shape[:-1], -1)], dim=-1)
    values, positions = scores.gather(-1, candidates).topk(k, dim=-1, sorted=False)  # [*rows, k]
    return values, candidates.gather(-1, positions)


def select_beside(
    scores: Float[Tensor, "*rows keys"], always: Bool[Tensor, "*rows keys"], k: int, most: int
) -> tuple[Float[Tensor, "*rows kept"], Int[Tensor, "*rows kept"]]:
    """Find the keys that are always kept, and beside them the k largest scores of the others.

    Args:
        scores: Scores; minus infinity where a key is not allowed, which is never kept.
        always: True for keys that are always kept; broadcasts against `scores`.
        k: Entries to find per row among the other keys.
        most: Maximum number of always kept keys per row.

    Returns:
        min(k + most, keys) scores per row and their distinct positions; minus infinity in surplus entries.
    """
    held = always & (scores > -torch.inf)
    ranks, index = select_topk(scores.masked_fill(held, torch.inf), k + most)  # [*rows, kept]
    held = ranks == torch.inf
    others = ranks.masked_fill(held, -torch.inf)
    best = others.topk(min(k, others.shape[-1]), dim=-1, sorted=False).indices  # [*rows, k]
    kept = held.scatter(-1, best, True)
    return scores.gather(-1, index).masked_fill(~kept, -torch.inf), index


def _group_size(keys: int, k: int, device: torch.device) -> int:
    # on a CPU, grouping is faster if it leaves few candidates; on a GPU torch.topk is used as it is (not measured)
    if device.type != "cpu" or keys < 16 * k or keys < 1024:
        return 1
    return 8 if keys >= 32 * k else 4


def check_k(k: int | None) -> None:
    """Check the number of kept scores.

    Raises:
        ConfigError: If `k` is smaller than 1.
    """
    if k is not None and k < 1:
        raise ConfigError(f"k is {k}. Expected a whole number from 1. To keep all scores, set k to None.")


def check_chunk_size(chunk_size: int | None) -> None:
    """Check the chunk size.

    Raises:
        ConfigError: If `chunk_size` is smaller than 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(
            f"chunk_size is {chunk_size}. Expected a whole number from 1. To choose it by size, set it to None."
        )


def check_dropout(dropout: float) -> None:
    """Check the dropout rate.

    Raises:
        ConfigError: If `dropout` is not in [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}. Expected a rate of at least 0 and below 1. Set it to 0 for none.")


def check_beside(first: int, recent: int) -> None:
    """Check the numbers of keys that are kept beside the k best.

    Raises:
        ConfigError: If one is negative.
    """
    if min(first, recent) < 0:
        raise ConfigError(f"first is {first} and recent is {recent}. Expected whole numbers from 0; 0 keeps none.")


def check_softcap(softcap: float | None) -> None:
    """Check the soft cap of the scores.

    Raises:
        ConfigError: If `softcap` is not above 0.
    """
    if softcap is not None and not softcap > 0.0:
        raise ConfigError(f"softcap is {softcap}. Expected a number above 0. For uncapped scores, set it to None.")


def row_blocks(rows: int, width: int, chunk_size: int | None, budget: int = SCORE_BUDGET) -> Iterator[tuple[int, int]]:
    """Split rows into nearly equal blocks of at most `chunk_size` rows and `budget` numbers, but at least one row.

    Source: ceil(rows / chunk_size) chunks; the authors' floor lets chunks grow to almost twice the requested size.

    Args:
        rows: Number of rows.
        width: Numbers per row.
        chunk_size: Maximum rows per block; None applies the budget only.
        budget: Maximum numbers per block.

    Yields:
        Start and exclusive end of each block.

    Example:
        >>> list(row_blocks(10, 1, 4))
        [(0, 4), (4, 8), (8, 10)]
    """
    size = max(1, budget // max(1, width))
    if chunk_size is not None:
        size = min(size, chunk_size)
    # nearly equal sizes let the allocator reuse the previous block's memory
    size = -(-rows // max(1, -(-rows // size))) or 1
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def index_dtype(keys: int) -> torch.dtype:
    """Return the narrowest integer dtype that can store a key position."""
    return torch.int16 if keys - 1 <= INT16_LIMIT else torch.int32
