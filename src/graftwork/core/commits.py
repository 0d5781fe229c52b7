"""Replacement of several files and folders in one step.

The new content is staged in `.commit.part`. Renaming that folder to `.commit` commits it; its entries are then moved to
their places. A process killed before the rename has changed nothing, and after it the next reader or writer completes
the moves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from graftwork.core import faults
from graftwork.core.files import remove_path, write_json
from graftwork.core.locks import locked
from graftwork.core.storage import writing as storage_errors
from graftwork.core.systems import sync_file
from graftwork.errors import IncompleteRunError, ReadOnlyError

COMMIT = ".commit"
STAGED = ".commit.part"
REMOVED_FILE = "removed.json"
"""Names in a commit that are removed from the folder."""
LOCK_FILE = ".lock"
WAIT_SECONDS = 60.0


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """Hold the lock for short changes of a folder, such as a commit or an update of `results.json`.

    Raises:
        ConfigError: If another process does not release the lock in time.
    """
    busy = f"Another process has been writing to {folder} for {WAIT_SECONDS:.0f} seconds. Wait until it has ended."
    with locked(folder / LOCK_FILE, busy, timeout=WAIT_SECONDS, reentrant=True):
        yield


@contextmanager
def staged(folder: Path, *, remove: Sequence[str] = ()) -> Generator[Path]:
    """Return an empty folder whose entries replace those of `folder` at the end of the block, all or none.

    Args:
        folder: Folder to change; created if it does not exist.
        remove: Names in `folder` that are removed in the same step.
    """
    complete(folder)
    staging = folder / STAGED
    shutil.rmtree(staging, ignore_errors=True)
    with storage_errors(folder):
        staging.mkdir(parents=True)
    try:
        yield staging
        with storage_errors(folder):
            _share(staging)
            if remove:
                write_json(staging / REMOVED_FILE, list(remove))
            faults.point("commit.staged", folder)
            with writing(folder):
                _complete(folder)
                staging.rename(folder / COMMIT)
                faults.point("commit.made", folder)
                _complete(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def complete(folder: Path) -> None:
    """Complete a commit whose process was killed; does nothing, and needs no write permission, if there is none.

    Raises:
        IncompleteRunError: If the folder contains such a commit and is read-only.
    """
    if not (folder / COMMIT).exists():
        return
    try:
        with writing(folder), storage_errors(folder):
            _complete(folder)
    except ReadOnlyError:
        raise IncompleteRunError(
            f"{folder} contains an unfinished change in {COMMIT} and is read-only. Open it once with write permission."
        ) from None


def _complete(folder: Path) -> None:
    """Move the entries of a commit to their places; each step can be repeated."""
    commit = folder / COMMIT
    if not commit.exists():
        return
    removed = commit / REMOVED_FILE
    if removed.exists():
        for name in json.loads(removed.read_text(encoding="utf-8")):
            remove_path(folder / Path(name).name)
            faults.point("commit.removed", folder / Path(name).name)
        removed.unlink()
    for entry in sorted(commit.iterdir()):
        target = folder / entry.name
        if entry.is_dir():
            remove_path(target)
            entry.rename(target)
        else:
            entry.replace(target)
        faults.point("commit.moved", target)
    commit.rmdir()


def _share(folder: Path) -> None:
    """Give staged files the permissions of the umask and write them to disk; some libraries create them as 0600."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        # a link to the weights of a base is not the run's own file
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
            sync_file(path)
