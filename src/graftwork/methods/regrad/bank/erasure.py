"""Erasure of passages: gradient and text are removed from all files of bank and index, and searched for afterwards.

A deletion makes a passage unreachable at once, but its bytes stay in files: the gradient until the bank is compacted
and no reader has an older state open, the text until its segment of the index is written anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from graftwork.errors import GraftworkError
from graftwork.methods.regrad.bank import changes, files
from graftwork.methods.regrad.bank.backends import file_contents
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.compaction import holds_deleted
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.retrieval.retriever import Passage

ROWS_AT_ONCE = 256
"""Number of gradients that are compared at once with bytes that were found."""
WINDOW = 48
"""Number of consecutive bytes of a gradient or a text that are searched for."""
WINDOWS = 8
"""Maximum number of windows of one gradient or text."""
_DISTINCT = 8
"""Minimum number of different bytes in a window; others, such as runs of zeros, occur anywhere."""


class ErasureError(GraftworkError, RuntimeError):
    """Bytes of an erased passage were found in a file, or deleted rows are left."""


@dataclass(frozen=True, slots=True)
class Needle:
    """Bytes to search for."""

    id: str
    kind: str
    """gradient, key or text."""
    content: bytes

    def described(self) -> dict[str, Any]:
        """Description without the bytes themselves, which would keep a part of what was erased."""
        return {"kind": self.kind, "bytes": len(self.content), "sha256": sha256(self.content).hexdigest()}


@dataclass(frozen=True, slots=True)
class Erased:
    """Record of an erasure; it contains digests of ids and of bytes only."""

    time: str
    ids: tuple[str, ...]
    """SHA-256 of each erased id."""
    shared: tuple[str, ...]
    """SHA-256 of those ids whose text another passage has: the gradient and the text belong to that passage too."""
    searched: tuple[Mapping[str, Any], ...]
    """Kind, length and SHA-256 of every sequence of bytes that was searched for and not found."""
    files: int
    """Number of files searched."""
    bytes: int
    """Number of bytes searched."""
    ids_left: int
    """Number of ids in the bank afterwards, all verified."""
    index: bool
    """True if an index was erased from and searched; those of search servers are not."""


def erase(bank: GradientBank, index: Any, ids: Sequence[str]) -> tuple[tuple[str, ...], Erased]:
    """Delete passages from bank and index, and remove their bytes and all older states from the files of both.

    Readers with an older state open move to the newest one. An erasure that is interrupted is completed by the next
    process that opens or changes bank and index; its record is then missing, and a second call writes one.

    Args:
        bank: The bank; open for writing.
        index: Index that is changed with it; None for none.
        ids: Ids of the passages.

    Returns:
        Ids that the bank did not contain, and the record, which is stored in the bank as well.

    Raises:
        ErasureError: If bytes of a passage were found afterwards.
    """
    changeable = changes.is_changeable(index)
    names = list(dict.fromkeys(ids))
    if changeable:
        index.refresh()
    passages: Mapping[str, Passage] = index.passages(names) if changeable else {}
    needles, shared = _needles(bank, names, passages)
    if changeable:
        missing = changes.delete(bank, index, names, erase=True)
    else:
        missing = bank.delete(names)
        bank.compact(purge=True)
    _check_versions(bank)
    searched = [needle for needle in needles if needle.id not in shared]
    count, size = _search(bank, index if changeable else None, searched)
    checked = verify(bank)
    while not checked.whole and bank.refresh():
        # another process has removed the files of the state that was read
        checked = verify(bank)
    if not checked.whole:
        raise ErasureError(f"{bank.backend} is damaged after an erasure: {checked.problems or checked.bad_ids}.")
    record = Erased(
        datetime.now(UTC).isoformat(timespec="seconds"),
        tuple(map(_digest, names)),
        tuple(map(_digest, sorted(shared))),
        tuple(needle.described() for needle in searched),
        count,
        size,
        checked.ids,
        changeable,
    )
    files.write_signed(bank.backend, f"erasure-{uuid4().hex}.json", asdict(record))
    return missing, record


def _needles(bank: GradientBank, ids: Sequence[str], passages: Mapping[str, Passage]) -> tuple[list[Needle], set[str]]:
    """Bytes of the passages, and the ids whose text other passages have too."""
    needles = [
        Needle(name, "text", content) for name, one in passages.items() for content in _windows(one.text.encode())
    ]
    rows = bank.rows(ids, on_missing="skip")
    for name, row in rows.items():
        needles += [Needle(name, "gradient", content) for content in _windows(bytes(row["value"]))]
        needles.append(Needle(name, "key", str(row["key"]).encode()))
    with files.reading(bank.backend):
        # reads the keys of all ids
        keys = sorted({str(row["key"]) for row in rows.values()})
        named = list(files.rows_where(bank.snapshot.ids, "key", keys, ["id", "key"]))
    kept = {row["key"] for row in named if row["id"] not in set(ids)}
    return needles, {name for name, row in rows.items() if row["key"] in kept}


def _windows(content: bytes) -> Iterator[bytes]:
    """Yield evenly spaced windows of a sequence of bytes; a short one is a window itself."""
    step = max(WINDOW, len(content) // WINDOWS)
    for start in range(0, max(1, len(content) - WINDOW + 1), step):
        window = content[start : start + WINDOW]
        if len(set(window)) >= _DISTINCT:
            yield window


def _search(bank: GradientBank, index: Any, needles: Sequence[Needle]) -> tuple[int, int]:
    """Search for bytes in all files of bank and index; return the number of files and of bytes.

    Raises:
        ErasureError: If some were found.
    """
    count = size = 0
    for name, chunks in _contents(bank, index):
        count += 1
        before = b""
        for chunk in chunks:
            size += len(chunk)
            # the end of the chunk before, in case that a window spans both
            both = before + chunk
            for needle in needles:
                if needle.content in both and not _belongs_to_another(bank, index, needle):
                    raise ErasureError(
                        f"Found bytes of the {needle.kind} of {needle.id!r} in {name} after its erasure. Stop every "
                        "process that uses this bank and index, and erase it again."
                    )
            before = both[-WINDOW:]
    return count, size


def _belongs_to_another(bank: GradientBank, index: Any, needle: Needle) -> bool:
    """True if a passage that is left has the same bytes: of its text, or of its gradient where its tokens are equal."""
    if needle.kind == "text":
        return _is_shared(index, needle)
    left = bank.ids() if needle.kind == "gradient" else ()
    # in parts, because the gradients of a bank exceed the memory
    parts = (left[start : start + ROWS_AT_ONCE] for start in range(0, len(left), ROWS_AT_ONCE))
    return any(needle.content in bytes(row["value"]) for part in parts for row in bank.rows(part).values())


def _contents(bank: GradientBank, index: Any) -> Iterator[tuple[str, Iterable[bytes]]]:
    yield from bank.backend.contents()
    if index is not None:
        folder = Path(index.folder)
        # a build that was interrupted, and the index that a new build has replaced
        for one in (folder, *(folder.with_name(f"{folder.name}.{kind}") for kind in ("part", "old", "vectors"))):
            yield from file_contents(one)


def _is_shared(index: Any, needle: Needle) -> bool:
    """True if another passage of the index contains these bytes of a text."""
    text = needle.content.decode(errors="ignore")
    return any(needle.content in hit.text.encode() for hit in index.search([text], 100)[0])


def _check_versions(bank: GradientBank) -> None:
    """Verify that the bank has no deleted rows and no state older than the one after the erasure.

    Raises:
        ErasureError: If it has.
    """
    with files.reading(bank.backend):
        for dataset in (bank.snapshot.records, bank.snapshot.ids):
            if holds_deleted(dataset) or min(one["version"] for one in dataset.versions()) < dataset.version:
                raise ErasureError(f"{bank.backend} contains deleted rows or older states. Erase the passages again.")


def _digest(id: str) -> str:
    return sha256(id.encode("utf-8", "surrogatepass")).hexdigest()
