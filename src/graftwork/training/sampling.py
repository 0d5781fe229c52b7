"""Order of examples: mixtures sampled by rate, packed rows, and length groups; all depend only on the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from graftwork.training.batching import EncodedDataset

BLOCK = 4096
"""Number of samples whose tasks are drawn with one random generator."""
OPEN_ROWS = 16
"""Number of packed rows that are open at once; a larger number wastes less space and shuffles the order more."""


OpenRow = tuple[list[int], list[int]]
"""Examples of a packed row, and the input and target tokens that are left in it."""


class MixtureSchedule:
    """Infinite sequence of example indices: tasks are sampled by share, and each task is reshuffled after every pass.

    Random access: any slice can be computed on its own, so a resumed training continues with the examples of an
    uninterrupted one.

    Args:
        sizes: Number of examples of each task; the data set is the concatenation of the tasks.
        shares: Sampling probability of each task.
        seed: Seed of the sequence.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self._offsets = [0, *accumulate(sizes)]
        self._shares = torch.tensor(shares, dtype=torch.float64)
        self._counts = [[0] * len(self.sizes)]
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def __getitem__(self, positions: slice[int, int, None]) -> list[int]:
        """Return the example indices at the positions of the slice."""
        found: list[int] = []
        for block in range(positions.start // BLOCK, -(-positions.stop // BLOCK)):
            first = block * BLOCK
            indices = self._block(block)
            found += indices[max(0, positions.start - first) : positions.stop - first]
        return found

    def tasks(self, start: int, stop: int) -> list[int]:
        """Return the task index at each position from `start` up to `stop`."""
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        chosen = [task for block in blocks for task in self._choices(block)]
        skipped = start - blocks.start * BLOCK
        return chosen[skipped : skipped + stop - start]

    def _choices(self, block: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, "task", block))
        return _integers(torch.multinomial(self._shares, BLOCK, replacement=True, generator=generator))

    def _block(self, block: int) -> list[int]:
        while len(self._counts) <= block:
            counts = list(self._counts[-1])
            for task in self._choices(len(self._counts) - 1):
                counts[task] += 1
            self._counts.append(counts)
        counts = list(self._counts[block])
        indices: list[int] = []
        for task in self._choices(block):
            indices.append(self._offsets[task] + self._nth(task, counts[task]))
            counts[task] += 1
        return indices

    def _nth(self, task: int, count: int) -> int:
        """Return the example of a task at its sample number `count`."""
        size = self.sizes[task]
        epoch, position = divmod(count, size)
        known = self._orders.get(task)
        if known is None or known[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self.seed, f"order {task}", epoch))
            known = (epoch, _integers(torch.randperm(size, generator=generator)))
            self._orders[task] = known
        return known[1][position]


class MixtureSampler(Sampler[int]):
    """Sampler that divides a mixture schedule into epochs for the Trainer.

    Args:
        schedule: Order of the examples.
        length: Number of samples per epoch; the next epoch continues the schedule.
    """

    def __init__(self, schedule: MixtureSchedule, length: int) -> None:
        self.schedule = schedule
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls it before each epoch, including a resumed one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        for first in range(start, start + self.length, BLOCK):
            yield from self.schedule[first : min(first + BLOCK, start + self.length)]


class PackedSampler(Sampler[tuple[int, ...]]):
    """Sampler of packed rows, filled in the order of a mixture schedule and divided into epochs for the Trainer.

    Args:
        schedule: Order of the examples.
        lengths: Numbers of input and target tokens of every example [examples 2].
        room: Maximum input and target tokens of a row; no example is longer.
        multiple: The number of rows per epoch is rounded up to a multiple of this number.
    """

    def __init__(self, schedule: MixtureSchedule, lengths: Any, room: tuple[int, int], multiple: int = 1) -> None:
        self.schedule = schedule
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.room = room
        filled = max(int(total) / room[side] for side, total in enumerate(self.lengths.sum(0)))
        self.length = max(1, -(-int(filled + 1) // multiple)) * multiple
        self.epoch = 0
        self._starts: dict[int, tuple[int, list[OpenRow]]] = {0: (0, [])}
        """Number of examples drawn before an epoch, and the rows that are open then."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls it before each epoch, including a resumed one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch = max(known for known in self._starts if known <= self.epoch)
        position, open_rows = self._starts[epoch]
        # a pass continues where the one before it ended
        rows = self._rows(position, [([*row], [*left]) for row, left in open_rows])
        for passed in range(epoch, self.epoch + 1):
            for _ in range(self.length):
                row, position, open_rows = next(rows)
                if passed == self.epoch:
                    yield row
            self._starts[passed + 1] = (position, [([*row], [*left]) for row, left in open_rows])

    def _rows(self, position: int, open_rows: list[OpenRow]) -> Iterator[tuple[tuple[int, ...], int, list[OpenRow]]]:
        """Yield packed rows infinitely, each with the state after it.

        An example goes into the first open row with enough room (first fit).
        """
        for index in self._stream(position):
            position += 1
            source, target = self.lengths[index].tolist()
            for row, left in open_rows:
                if left[0] >= source and left[1] >= target:
                    row.append(index)
                    left[0] -= source
                    left[1] -= target
                    break
            else:
                open_rows.append(([index], [self.room[0] - source, self.room[1] - target]))
                if len(open_rows) > OPEN_ROWS:
                    yield tuple(open_rows.pop(0)[0]), position, open_rows

    def _stream(self, first: int) -> Iterator[int]:
        while True:
            stop = (first // BLOCK + 1) * BLOCK
            yield from self.schedule[first:stop]
            first = stop


class LengthGroups(Sampler[int]):
    """Transformers' length grouping, with an order that depends only on the seed and the epoch.

    Args:
        dataset: Encoded examples.
        group: Number of examples of one update; they have similar lengths.
        seed: Seed of the order.
    """

    def __init__(self, dataset: EncodedDataset, group: int, seed: int) -> None:
        self.dataset = dataset
        self.group = group
        self.seed = seed
        self.epoch = 0
        own = getattr(dataset, "input_lengths", None)
        self.lengths: list[int] = (
            [len(dataset[index]["input_ids"]) for index in range(len(dataset))] if own is None else own().tolist()
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls it before each epoch, including a resumed one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(LengthGroupedSampler(self.group, lengths=self.lengths, generator=generator))


def _integers(values: Tensor) -> list[int]:
    """Convert a vector [values] to a list."""
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def _mixed(seed: int, word: str, number: int) -> int:
    """Derive an independent seed for each use, so that random streams are not correlated."""
    return int.from_bytes(blake2b(f"{seed}:{word}:{number}".encode(), digest_size=7).digest())
