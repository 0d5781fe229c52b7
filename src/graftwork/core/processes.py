"""Distributed processes: main process, barriers, setup of the process group.

Ranks are read from the environment and barriers use the process group itself: `accelerate`'s state treats each process
that `torchrun` starts on CPUs as a single process.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


def init_process_group(*, cpu: bool = False) -> None:
    """Set up the process group if several processes were started and none exists yet.

    Args:
        cpu: Communicate between CPUs, also on a machine with accelerators.
    """
    from accelerate import PartialState  # pyright: ignore[reportMissingTypeStubs]

    PartialState(cpu=cpu)


def is_main_process() -> bool:
    """True in the process that writes files and messages; always True for a single process."""
    # `accelerate launch` and `torchrun` set RANK in each process that they start
    return os.environ.get("RANK", "0") == "0"


def process_index() -> int:
    """Number of this process among all; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Number of processes that `torchrun` or `accelerate launch` started on all machines; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its machine; 0 for a single process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes_here() -> int:
    """Number of processes that `torchrun` or `accelerate launch` started on this machine; 1 without them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Block until every process has reached this call."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # pyright: ignore[reportUnknownMemberType]


def gather(value: object) -> list[Any]:
    """Values of all processes, in the order of their numbers; a list with the own one for a single process."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)  # pyright: ignore[reportUnknownMemberType]
    return found


@contextmanager
def main_process_first() -> Generator[None, None, None]:
    """Run the block in the main process first, then in the other processes."""
    if not is_main_process():
        wait_for_everyone()
    yield
    if is_main_process():
        wait_for_everyone()
