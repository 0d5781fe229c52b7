"""The order of examples where tasks are mixed by rate, and how several share a row: both depend on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate

import torch
from torch.utils.data import Sampler

BLOCK = 4096
"""Draws whose tasks are chosen at once."""
OPEN_ROWS = 16
"""Rows that are filled at the same time; more waste less and mix the order more."""


class Draws:
    """An endless stream of examples: each task is shuffled and repeated, and drawn in proportion to its share.

    Any draw can be computed without those before it having been used, so a stopped training goes on with the examples
    that an uninterrupted one would have drawn.

    Args:
        sizes: Examples of each task, which stand behind one another.
        shares: Share of draws of each task.
        seed: Seed of the stream.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self._offsets = [0, *accumulate(sizes)]
        self._shares = torch.tensor(shares, dtype=torch.float64)
        self._counts = [[0] * len(self.sizes)]
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def __getitem__(self, draws: slice) -> list[int]:
        """Indices of the examples of the draws start…stop."""
        found: list[int] = []
        for block in range(draws.start // BLOCK, -(-draws.stop // BLOCK)):
            first = block * BLOCK
            indices = self._block(block)
            found += indices[max(0, draws.start - first) : draws.stop - first]
        return found

    def tasks(self, start: int, stop: int) -> list[int]:
        """Number of the task that each draw start…stop comes from."""
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        chosen = [task for block in blocks for task in self._choices(block)]
        skipped = start - blocks.start * BLOCK
        return chosen[skipped : skipped + stop - start]

    def _choices(self, block: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, "task", block))
        return torch.multinomial(self._shares, BLOCK, replacement=True, generator=generator).tolist()

    def _block(self, block: int) -> list[int]:
        while len(self._counts) <= block:
            counts = list(self._counts[-1])
            for task in self._choices(len(self._counts) - 1):
                counts[task] += 1
            self._counts.append(counts)
        counts = list(self._counts[block])
        indices = []
        for task in self._choices(block):
            indices.append(self._offsets[task] + self._nth(task, counts[task]))
            counts[task] += 1
        return indices

    def _nth(self, task: int, count: int) -> int:
        """Which example of a task its draw number `count` is."""
        size = self.sizes[task]
        lap, position = divmod(count, size)
        known = self._orders.get(task)
        if known is None or known[0] != lap:
            generator = torch.Generator().manual_seed(_mixed(self.seed, f"order {task}", lap))
            known = self._orders[task] = (lap, torch.randperm(size, generator=generator).tolist())
        return known[1][position]


class MixtureSampler(Sampler[int]):
    """Draws by rate, cut into epochs for the Trainer.

    Args:
        draws: The stream.
        length: Draws of one epoch; those of the next go on where these end.
    """

    def __init__(self, draws: Draws, length: int) -> None:
        self.draws = draws
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        for first in range(start, start + self.length, BLOCK):
            yield from self.draws[first : min(first + BLOCK, start + self.length)]


class PackedSampler(Sampler[tuple[int, ...]]):
    """Rows of several examples each, filled from a stream in its order, cut into epochs for the Trainer.

    Args:
        draws: The stream.
        lengths: (input tokens, target tokens) of every example.
        room: The most input and target tokens of a row; no example is longer.
        multiple: Rows of an epoch are rounded up to a multiple of this.
    """

    def __init__(
        self, draws: Draws, lengths: Sequence[tuple[int, int]], room: tuple[int, int], multiple: int = 1
    ) -> None:
        self.draws = draws
        self.lengths = lengths
        self.room = room
        filled = max(sum(own[side] for own in lengths) / room[side] for side in (0, 1))
        self.length = max(1, -(-int(filled + 1) // multiple)) * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        start = self.epoch * self.length
        for number, row in enumerate(self._rows()):
            if number >= start + self.length:
                return
            if number >= start:
                yield row

    def _rows(self) -> Iterator[tuple[int, ...]]:
        """Rows without end: an example goes into the first open row that has room for it."""
        open_rows: list[tuple[list[int], list[int]]] = []
        for index in self._stream():
            source, target = self.lengths[index]
            for row, left in open_rows:
                if left[0] >= source and left[1] >= target:
                    row.append(index)
                    left[0] -= source
                    left[1] -= target
                    break
            else:
                open_rows.append(([index], [self.room[0] - source, self.room[1] - target]))
                if len(open_rows) > OPEN_ROWS:
                    yield tuple(open_rows.pop(0)[0])

    def _stream(self) -> Iterator[int]:
        first = 0
        while True:
            yield from self.draws[first : first + BLOCK]
            first += BLOCK


def _mixed(seed: int, word: str, number: int) -> int:
    """A seed of its own for each use, so that no two streams run in step."""
    return int.from_bytes(blake2b(f"{seed}:{word}:{number}".encode(), digest_size=7).digest())
