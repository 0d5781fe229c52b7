"""Checkpoints of a training phase: naming, and search for the newest complete one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from zipfile import ZipFile

from graftwork.core.digests import describe_files, verify_files
from graftwork.core.files import read_json, write_record
from graftwork.core.readers import read_head
from graftwork.core.safetensors_files import safetensors_problem
from graftwork.errors import CheckpointMismatchError, GraftworkError, IncompleteRunError

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
"""File of the Trainer's state in a checkpoint, which the Trainer writes last."""
PHASE_FILE = "phase.pt"
"""File of the phase's state in a checkpoint, next to the Trainer's files."""
DIGESTS_FILE = "digests.json"
"""Size and SHA-256 of the other files of a checkpoint."""


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is complete and readable, or None; each damaged one is named by a warning."""
    found = sorted(
        (path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.name[len(CHECKPOINT_PREFIX) :].isdigit()),
        key=lambda path: int(path.name[len(CHECKPOINT_PREFIX) :]),
        reverse=True,
    )
    for path in filter(is_complete, found):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s); an earlier checkpoint is used.", path, problem)
    return None


def write_digests(checkpoint: Path) -> None:
    """Write size and SHA-256 of every file of a checkpoint, which `damage` compares."""
    write_record(checkpoint / DIGESTS_FILE, {"files": describe_files(checkpoint)})


def remove_incomplete(folder: Path) -> None:
    """Remove checkpoints that a killed process was writing; no other function uses them."""
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        if path.name[len(CHECKPOINT_PREFIX) :].isdigit() and not is_complete(path) and _is_cut_off(path):
            logger.info("%s is incomplete and is removed.", path)
            shutil.rmtree(path, ignore_errors=True)
        for leftover in path.glob(f".{DIGESTS_FILE}.*.part"):
            leftover.unlink()


def _is_cut_off(checkpoint: Path) -> bool:
    """True if the Trainer's state is missing or no JSON; False if it cannot be read, which may pass."""
    try:
        read_json(checkpoint / STATE_FILE)
    except (IncompleteRunError, CheckpointMismatchError):
        return True
    except GraftworkError:
        return False
    return False


def damage(checkpoint: Path) -> str | None:
    """Return the first damaged file of a checkpoint and its fault, or None.

    Every byte is compared with the digests of the checkpoint. In checkpoints of earlier versions, which have none,
    sizes of safetensors files and checksums inside files of `torch.save` are compared; tensors are not decoded.
    """
    if (checkpoint / DIGESTS_FILE).exists():
        try:
            recorded = read_json(checkpoint / DIGESTS_FILE)
            verify_files(checkpoint, recorded["files"], deep=True)
        except (GraftworkError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        return None
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            problem = safetensors_problem(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            problem = _archive_problem(path)
        else:
            continue
        if problem is not None:
            return f"{path.name}: {problem}"
    return None


def _archive_problem(path: Path) -> str | None:
    if read_head(path, 2) != b"PK":
        # torch also reads an older format without checksums, and the Trainer's arguments are such a pickle
        return "it is empty" if path.stat().st_size == 0 else None
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    # zipfile raises errors of many types for damaged archives
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if damaged is None else f"wrong checksum of {damaged}"


def is_complete(checkpoint: Path) -> bool:
    """True if a checkpoint was written completely."""
    # the Trainer writes its state last, so a readable state implies that all other files exist
    state = checkpoint / STATE_FILE
    if not state.exists():
        return False
    try:
        return isinstance(read_json(state), dict)
    except GraftworkError:
        return False
