"""Changes of a bank together with an index.

A change is recorded in the folder of the index before the first of the two is changed. A process killed in between
leaves the record, and the next process that opens or changes both completes it: passages that the bank has received
are added to the index, and deleted passages are deleted from both.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwork.core import faults
from graftwork.core.files import read_json, write_json
from graftwork.core.locks import locked
from graftwork.core.storage import writing
from graftwork.errors import ConfigError, StorageError
from graftwork.methods.regrad.bank import files
from graftwork.methods.regrad.bank.compaction import is_removal_due
from graftwork.methods.regrad.bank.errors import BankLockedError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.retrieval.erasing import holds_deleted
from graftwork.retrieval.retriever import Passage

logger = logging.getLogger(__name__)

CHANGE_FILE = "change.json"
"""File in the folder of an index that records a change of bank and index."""
LOCK_FILE = ".change.lock"
LOCK_SECONDS = 60.0


def is_changeable(index: Any) -> bool:
    """True if passages can be added to an index and deleted from it; those of search servers cannot."""
    return all(hasattr(index, name) for name in ("add", "delete", "folder"))


@contextmanager
def added(bank: GradientBank, index: Any, passages: Mapping[str, tuple[Passage, str]]) -> Generator[None]:
    """Add to the index, at the end of the block, the passages that the bank has received in it.

    Args:
        bank: The bank; open for writing.
        index: Index that is changed with it.
        passages: Id to passage and the key of its text.

    Raises:
        BankLockedError: If another process changes both for too long.
        ConfigError: If the index is read-only.
        StorageError: If the disk is full; the change is completed by the next one.
    """
    record = {"add": [[one.id, one.text, one.title, key] for one, key in passages.values()], "delete": []}
    with _lock(index):
        _record(bank, index, record)
        try:
            yield
        finally:
            # passages of batches before an error are in the bank
            with writing(index.folder):
                faults.point("change.first", index.folder)
            _add(bank, index, record)
            _remove_record(index)


def delete(bank: GradientBank, index: Any, ids: Sequence[str], *, erase: bool = False) -> tuple[str, ...]:
    """Delete passages from index and bank.

    The index is changed first, so that no search returns a passage without gradient.

    Args:
        bank: The bank; open for writing.
        index: Index that is changed with it.
        ids: Ids of the passages.
        erase: Remove their bytes from the files of both, and older states of the bank; see `erasure.erase`.

    Returns:
        Ids that the bank did not contain.
    """
    with _lock(index):
        _record(bank, index, {"add": [], "delete": list(ids), "erase": erase})
        missing = _delete(bank, index, ids, erase=erase)
        _remove_record(index)
    return missing


def _delete(bank: GradientBank, index: Any, ids: Sequence[str], *, erase: bool) -> tuple[str, ...]:
    (index.erase if erase else index.delete)(ids)
    with writing(index.folder):
        faults.point("change.first", index.folder)
    missing = bank.delete(ids)
    if erase:
        bank.compact(purge=True)
    return missing


def remove_deleted(bank: GradientBank, index: Any) -> bool:
    """Remove what earlier deletions have left from the files of bank and index, except states that a reader has open.

    Args:
        bank: The bank; open for writing.
        index: Index that is changed with it; left as it is if it cannot be changed.

    Returns:
        True if there was something to remove.
    """
    bank.refresh()
    with files.reading(bank.backend):
        found = is_removal_due(bank.snapshot.records, bank.snapshot.ids)
    if found:
        bank.compact()
    if is_changeable(index) and holds_deleted(Path(index.folder)):
        with _lock(index):
            _complete(bank, index)
            index.erase([])
        found = True
    return found


def complete(bank: GradientBank, index: Any) -> None:
    """Complete a change that a killed process has left; warns if that is impossible, as in a read-only folder.

    Args:
        bank: The bank; moves to the newest state.
        index: Index that was changed with it; nothing happens if it cannot be changed.
    """
    if not (is_changeable(index) and (Path(index.folder) / CHANGE_FILE).exists()):
        return
    try:
        with _lock(index):
            _complete(bank if bank.mode == "a" else GradientBank(bank.backend, "a"), index)
        bank.refresh()
    except (ConfigError, StorageError, BankLockedError) as error:
        logger.warning("%s contains an unfinished change, which could not be completed: %s", index.folder, error)


def _record(bank: GradientBank, index: Any, record: Mapping[str, Any]) -> None:
    """Complete an earlier change, and record this one."""
    file = Path(index.folder) / CHANGE_FILE
    _complete(bank, index)
    write_json(file, record)
    with writing(file):
        faults.point("change.recorded", file)


def _remove_record(index: Any) -> None:
    file = Path(index.folder) / CHANGE_FILE
    with writing(file):
        faults.point("change.both", file)
        file.unlink()


def is_running(index: Any) -> bool:
    """True while a process changes a bank and this index; a record that a killed process has left does not count."""
    if not (is_changeable(index) and (Path(index.folder) / CHANGE_FILE).exists()):
        return False
    try:
        with locked(Path(index.folder) / LOCK_FILE, "", error=BankLockedError):
            return False
    except BankLockedError:
        return True
    except StorageError:  # a read-only folder
        return False


def _lock(index: Any) -> Any:
    busy = f"Another process has been changing {index.folder} for {LOCK_SECONDS:.0f} seconds. Wait until it has ended."
    return locked(Path(index.folder) / LOCK_FILE, busy, timeout=LOCK_SECONDS, error=BankLockedError)


def _complete(bank: GradientBank, index: Any) -> None:
    file = Path(index.folder) / CHANGE_FILE
    if not file.exists():
        return
    record: dict[str, Any] = read_json(file)
    _add(bank, index, record)
    if record["delete"]:
        _delete(bank, index, record["delete"], erase=bool(record.get("erase")))
    with writing(file):
        file.unlink()


def _add(bank: GradientBank, index: Any, record: Mapping[str, Any]) -> None:
    """Add those recorded passages to the index whose present text is in the bank."""
    found = bank.keys([entry[0] for entry in record["add"]])
    passages = [Passage(name, text, title) for name, text, title, key in record["add"] if found.get(name) == key]
    if passages:
        index.add(passages)
