"""Numbers of tokens of examples, computed in batches and cached for tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.core.cache import LENGTHS, cache_folder, cache_limit, mark_used, remove_oldest
from graftwork.core.digests import tokenizer_digest
from graftwork.core.example import Example
from graftwork.core.progress import Progress
from graftwork.core.storage import writing
from graftwork.core.stored_rows import BATCH, JoinedRows, StoredRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Lengths = np.ndarray[Any, np.dtype[np.int32]]
"""Numbers of tokens: one for each example [examples], or one column for inputs and one for targets [examples 2]."""


def row_lengths(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    count: Callable[[Sequence[Example]], Sequence[Any]],
    *definition: object,
) -> Lengths:
    """Count the tokens of every example, in batches; those of a cached table are cached with it.

    Args:
        rows: Examples.
        tokenizer: Tokenizer that `count` uses.
        count: Returns one number, or a pair of numbers, for each example of a batch.
        definition: Everything else that the numbers depend on, such as maximum lengths.
    """
    if isinstance(rows, JoinedRows):
        return np.concatenate([row_lengths(part, tokenizer, count, *definition) for part in rows.parts])
    file = None
    if isinstance(rows, StoredRows) and rows.key is not None and cache_limit():
        parts = [rows.key, tokenizer_digest(tokenizer), *map(repr, definition)]
        key = sha256("\0".join(parts).encode()).hexdigest()[:32]
        file = cache_folder() / LENGTHS / f"{key}.npy"
        if (found := _read(file, len(rows))) is not None:
            return found
    numbers: list[Any] = []
    with Progress("token lengths", total=len(rows)) as progress:
        for part in batches(rows):
            numbers.append(np.asarray(count(part), dtype=np.int32))
            progress.advance(len(part))
    lengths = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int32)
    if file is not None:
        _write(file, lengths)
    return lengths


def longest_first(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[int]:
    """Positions of the rows by decreasing number of tokens of the whole text; equal lengths keep their order."""

    def count(part: Sequence[Example]) -> list[int]:
        encoded: Any = tokenizer([row.text for row in part], truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    order: Any = np.argsort(-row_lengths(rows, tokenizer, count, "whole text"), kind="stable")
    return order.tolist()


def batches(rows: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Yield the rows in batches."""
    for start in range(0, len(rows), BATCH):
        yield list(rows[start : start + BATCH])


def _read(file: Path, count: int) -> Lengths | None:
    with suppress(OSError, ValueError, EOFError):
        found = np.load(file, allow_pickle=False)
        if found.shape[:1] == (count,) and found.dtype == np.int32:
            mark_used(file)
            return found
    return None


def _write(file: Path, lengths: Lengths) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".lengths-", dir=file.parent, delete=False) as part:
            np.save(part, lengths)
        Path(part.name).replace(file)
    remove_oldest(LENGTHS, keep=file)
