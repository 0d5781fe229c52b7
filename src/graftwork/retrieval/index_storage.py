"""Files of the embedded index: commit record, digests, checksums, and access to tantivy."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

from graftwork.core.files import apply_umask, read_json, write_json
from graftwork.core.native import first_line, is_panic
from graftwork.core.storage import disk_error, storage_error
from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.retrieval.retriever import DamagedIndexError, IncompleteIndexError, IndexLockedError

RECORD_FILE = "index.json"
"""File name of the commit record."""
META_FILE = "meta.json"
"""File in which tantivy lists the segments of its last commit."""
MEMORY_BYTES = 256 << 20
"""Memory budget of the index writer before it writes a segment; the index itself is memory-mapped."""
FULL_CHECK_BYTES = 1 << 30
"""Size up to which all files are hashed when an index is opened; larger files are compared by size only."""
LOCK_SECONDS = 10.0
"""Longest wait for another writer of the same index."""
WRITER_LOCK = ".writer.lock"
"""File name of the writers' lock."""
FIELDS = ("title", "text")
"""Stored fields; the terms of each are indexed separately."""
_ALWAYS_CHECKED_BYTES = 1 << 20
_WRITER_THREADS = 2
_SCHEMA = 2
_SIGNATURE = "record_digest"
_DIGESTS = "index_files"
_LOCK_FILE = ".tantivy-meta.lock"
_FOOTER_MAGIC = 1337
_CHUNK = 1 << 22


def part_of(folder: Path) -> Path:
    """Folder of an unfinished first build; `folder` itself if it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    return part if not folder.exists() and (part / RECORD_FILE).exists() else folder


def read_record(folder: Path) -> dict[str, Any]:
    """Read the commit record of an index.

    Raises:
        ConfigError: If the folder holds no index.
        IncompleteIndexError: If its first build was not completed.
        DamagedIndexError: If the record was changed after it was written.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        part = part_of(folder)
        if part != folder:
            raise IncompleteIndexError(
                f"{folder} was never finished; the partial index is in {part}. Run `graftwork index` again to finish, "
                "or pass --allow-incomplete to search the passages it has."
            )
        raise ConfigError(f"Found no index in {folder}; expected {RECORD_FILE}. Build one with `graftwork index`.")
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedIndexError(f"{path}: found no JSON object. Restore the file, or build the index again.")
    record = cast("dict[str, Any]", value)
    # records of schema 1 have no signature and no digests
    if (record.get("schema") != 1 or _DIGESTS in record) and record.get(_SIGNATURE) != _signature(record):
        raise DamagedIndexError(f"{path} was changed after it was written. Restore the file, or build the index again.")
    return record


def record_content(folder: Path) -> bytes | None:
    """Bytes of the commit record, to notice a change; None while the folder has none."""
    try:
        return (folder / RECORD_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_record(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a commit record with its signature; return it."""
    signed = {**record, "schema": _SCHEMA}
    signed[_SIGNATURE] = _signature(signed)
    write_json(folder / RECORD_FILE, signed)
    return signed


def with_digests(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with size and digest of every file of the last commit.

    Files of segments never change, so that known digests are kept.
    """
    known: Mapping[str, Any] = record.get(_DIGESTS, {})
    files = committed_files(folder)
    new = [name for name in files if name == META_FILE or name not in known]
    with _named_errors(folder), ThreadPoolExecutor(_threads()) as pool:
        made = dict(zip(new, pool.map(_digest, [folder / name for name in new]), strict=True))
    return {**record, _DIGESTS: {name: made.get(name) or known[name] for name in files}}


def has_digests(record: Mapping[str, Any]) -> bool:
    """Return True if the record holds digests; those of earlier versions do not."""
    return _DIGESTS in record


def committed_files(folder: Path) -> list[str]:
    """Names of the files of tantivy's last commit: `meta.json` and the files of its segments.

    Raises:
        DamagedIndexError: If `meta.json` is not readable.
    """
    deletes: dict[str, Any] = {}
    for one in committed_segments(folder):
        deleted: dict[str, Any] = one["deletes"] or {}
        deletes[one["segment_id"].replace("-", "")] = deleted.get("opstamp")
    found = [META_FILE]
    for path in sorted(folder.iterdir()):
        segment, _, kind = path.name.partition(".")
        if segment in deletes and (not kind.endswith("del") or kind == f"{deletes[segment]}.del"):
            found.append(path.name)
    return found


def committed_segments(folder: Path) -> list[dict[str, Any]]:
    """Entries of the segments in tantivy's last commit: `segment_id`, `max_doc` and `deletes`.

    Raises:
        DamagedIndexError: If `meta.json` is not readable.
    """
    try:
        segments: list[dict[str, Any]] = json.loads((folder / META_FILE).read_bytes())["segments"]
        for one in segments:
            deleted: dict[str, Any] = one["deletes"] or {}
            _ = one["segment_id"].replace("-", ""), int(one["max_doc"]), deleted.get("opstamp")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, PermissionError):
            raise
        raise DamagedIndexError(
            f"{folder / META_FILE} is not readable ({first_line(error)}). Restore the file, or build the index again."
        ) from None
    return segments


def check_files(
    folder: Path, record: Mapping[str, Any], *, deep: bool = False, verified: Mapping[str, Any] | None = None
) -> int:
    """Compare the files of an index with the digests of its record, and with tantivy's checksums.

    Args:
        folder: Folder of the index.
        record: Its commit record.
        deep: Read every file completely. Otherwise indexes above `FULL_CHECK_BYTES` are compared by size, except for
            small files.
        verified: An earlier record whose files were compared; those with an unchanged digest are compared by size.

    Returns:
        Number of files.

    Raises:
        DamagedIndexError: If a file is missing, or its content changed.
    """
    known: Mapping[str, Any] = record.get(_DIGESTS, {})
    earlier: Mapping[str, Any] = (verified or {}).get(_DIGESTS, {})
    with _named_errors(folder):
        present = committed_files(folder)
        # a pending change may have been committed, which replaces meta.json and the files of merged segments
        pending = "pending" in record
        missing = sorted(set(known) - set(present))
        if missing and not pending:
            raise _damaged(folder / missing[0], "is missing")
        total = sum((folder / name).stat().st_size for name in present)
        everything = deep or total <= FULL_CHECK_BYTES

        def check(name: str) -> None:
            path, expected = folder / name, known.get(name)
            size = path.stat().st_size
            if expected is None and known and not pending:
                raise _damaged(path, "is not part of the commit record")
            if pending and name == META_FILE:
                return
            if expected is not None and size != expected["bytes"]:
                raise _damaged(path, f"has {size} bytes; expected {expected['bytes']}")
            if not everything and size > _ALWAYS_CHECKED_BYTES:
                return
            if not deep and expected is not None and earlier.get(name) == expected:
                return
            if expected is not None and _digest(path) != expected:
                raise _damaged(path, "differs from its digest in the commit record")
            if (expected is None or deep) and name != META_FILE:
                check_footer(path)

        with ThreadPoolExecutor(_threads()) as pool:
            list(pool.map(check, present))
    return len(present)


def open_tantivy(folder: Path, *, create: bool = False) -> Any:
    """Open or create the tantivy index of a folder.

    Raises:
        IncompleteIndexError: If tantivy cannot open it.
        MissingExtraError: If tantivy is not installed.
    """
    try:
        from tantivy import Index, SchemaBuilder, TextAnalyzerBuilder, Tokenizer
    except ImportError:
        raise MissingExtraError("tantivy", "regrad") from None
    builder = SchemaBuilder().add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    for name in FIELDS:
        # the text is stored only; searches use the terms, which are analysed before indexing
        builder.add_bytes_field(name, stored=True)
        builder.add_text_field(f"{name}_terms", stored=False, tokenizer_name="blanks", index_option="freq")
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with tantivy_errors(folder):
            index = Index(builder.build(), str(folder)) if create else Index.open(str(folder))
    except DamagedIndexError as error:
        raise IncompleteIndexError(
            f"{folder} cannot be opened as an index ({first_line(error.__cause__ or error)}). Build it again."
        ) from error
    # tokenizers are registered per index object; the folder does not store them
    index.register_tokenizer("blanks", TextAnalyzerBuilder(Tokenizer.whitespace()).build())
    return index


def is_writable(folder: Path) -> bool:
    """Return True if tantivy can take its locks in a folder; opening an index takes one, too."""
    lock = folder / _LOCK_FILE
    return os.access(folder, os.W_OK) and (not lock.exists() or os.access(lock, os.W_OK))


def linked_copy(folder: Path) -> Path:
    """A temporary folder with symbolic links to the files of an index, in which tantivy can take its lock.

    The files are copied where links need a privilege, as on Windows.
    """
    copy = Path(mkdtemp(prefix="graftwork-index-"))
    for name in committed_files(folder):
        try:
            (copy / name).symlink_to((folder / name).resolve())
        except OSError:
            shutil.copyfile(folder / name, copy / name)
    return copy


@contextmanager
def write_lock(folder: Path) -> Generator[None]:
    """Exclusive right to change an index and its commit record, released when its process dies.

    Raises:
        IndexLockedError: If another writer holds it for more than `LOCK_SECONDS`.
        StorageError: If the folder is read-only or the disk is full.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / WRITER_LOCK), thread_local=False)
    try:
        with tantivy_errors(folder):
            lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise _locked(folder) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def index_writer(index: Any, folder: Path) -> Generator[Any]:
    """Exclusive writer of an index; an error discards its changes, and the lock is always released.

    Raises:
        IndexLockedError: If another writer holds the lock.
        StorageError: If the disk is full or the folder is read-only.
    """
    with tantivy_errors(folder):
        writer = index.writer(MEMORY_BYTES, _WRITER_THREADS)
    try:
        with tantivy_errors(folder):
            yield writer
    except BaseException:
        with suppress(Exception), tantivy_errors(folder):
            writer.rollback()
        raise
    finally:
        # releases the lock; without it the lock lives as long as a traceback that refers to the writer
        with suppress(Exception), tantivy_errors(folder):
            writer.wait_merging_threads()
        readable_by_others(folder)


def readable_by_others(folder: Path) -> None:
    """Apply the umask to the files that tantivy creates with mode 0600."""
    for name in (META_FILE, ".managed.json"):
        apply_umask(folder / name)


@contextmanager
def tantivy_errors(folder: Path) -> Generator[None]:
    """Raise every error and every panic of tantivy as an error of the index that names its folder.

    Raises:
        IndexLockedError: If another writer holds the lock.
        StorageError: If the disk is full or the folder is read-only.
        DamagedIndexError: If tantivy cannot read the index.
    """
    try:
        yield
    except (GraftworkError, TimeoutError):
        raise
    except (ValueError, OSError, RuntimeError) as error:
        text = str(error)
        if "LockBusy" in text or "Failed to acquire" in text:
            raise _locked(folder) from error
        if (found := disk_error(error, folder)) is not None:
            raise found from error
        if "io::Error most likely" in text and (found := storage_error(error, folder)) is not None:
            raise found from error
        raise _damaged(folder, f"cannot be read by tantivy ({first_line(error)})") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise _damaged(folder, f"cannot be read by tantivy ({first_line(error)})") from error


@contextmanager
def _named_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be read ({error.strerror}). Change its permissions."
        ) from None
    except OSError as error:
        raise _damaged(folder, f"cannot be read ({error})") from error


def _locked(folder: Path) -> IndexLockedError:
    return IndexLockedError(f"{folder} is being changed by another process or thread. Wait for it, or stop it.")


def _damaged(path: Path, found: str) -> DamagedIndexError:
    return DamagedIndexError(f"{path} {found}. Restore the index from a copy, or build it again with --overwrite.")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def check_footer(path: Path) -> None:
    """Compare the checksum in the footer that tantivy writes below every file with the content."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        tail = file.read()
        length, magic = int.from_bytes(tail[:4], "little"), int.from_bytes(tail[4:], "little")
        body = size - 8 - length
        if magic != _FOOTER_MAGIC or body < 0:
            raise _damaged(path, "has no footer with a checksum")
        file.seek(body)
        try:
            expected = json.loads(file.read(length))["crc"]
        except (ValueError, TypeError, LookupError):
            raise _damaged(path, "has no readable footer") from None
        file.seek(0)
        found = 0
        while body > 0 and (chunk := file.read(min(_CHUNK, body))):
            found, body = zlib.crc32(chunk, found), body - len(chunk)
    if found != expected:
        raise _damaged(path, "differs from tantivy's checksum")


def _signature(record: Mapping[str, Any]) -> str:
    unsigned = {key: value for key, value in record.items() if key != _SIGNATURE}
    return sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
