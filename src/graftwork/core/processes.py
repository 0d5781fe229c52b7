"""Several processes at one task: which one writes, and waiting for the others.

`accelerate`'s own state takes each process that `torchrun` starts on CPUs for the only one, so the environment and the
process group themselves are asked here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def meet() -> None:
    """Set up the process group, where several processes were started and none has done so."""
    from accelerate import PartialState

    PartialState()


def first_process() -> bool:
    """Whether this process is the one that writes and tells; a single one always is."""
    # what `accelerate launch` and `torchrun` tell each process that they start
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return once every process has come here."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """What one process does before the others do it."""
    if not first_process():
        wait_for_all()
    yield
    if first_process():
        wait_for_all()
