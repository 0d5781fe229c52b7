"""Checkpoints of a training phase: naming, and search for the newest complete one."""

from __future__ import annotations

from pathlib import Path

from graftwork.core.files import read_json
from graftwork.errors import GraftworkError

CHECKPOINT_PREFIX = "checkpoint-"
PHASE_FILE = "phase.pt"
"""File of the phase's state in a checkpoint, next to the Trainer's files."""


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = sorted(
        (path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.name[len(CHECKPOINT_PREFIX) :].isdigit()),
        key=lambda path: int(path.name[len(CHECKPOINT_PREFIX) :]),
        reverse=True,
    )
    return next((path for path in found if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """True if a checkpoint was written completely."""
    # the Trainer writes its state last, so a readable state implies that all other files exist
    state = checkpoint / "trainer_state.json"
    if not state.exists():
        return False
    try:
        return isinstance(read_json(state), dict)
    except GraftworkError:
        return False
