"""Embedded BM25 index: a tantivy index in a folder, with Lucene's English analysis and a commit record."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import finalize

from graftwork.core import faults
from graftwork.core.files import recover_folder, swap_folder
from graftwork.core.storage import writing
from graftwork.errors import ConfigError, DataError, GraftworkError
from graftwork.retrieval.analysis import EnglishAnalyser
from graftwork.retrieval.corpus import CorpusReader, add_digest, find_corpus, surrogate_in
from graftwork.retrieval.erasing import holds_deleted, rewrite, segments_to_rewrite
from graftwork.retrieval.index_storage import (
    RECORD_FILE,
    check_files,
    has_digests,
    index_writer,
    is_writable,
    linked_copy,
    open_tantivy,
    part_of,
    read_record,
    record_content,
    tantivy_errors,
    with_digests,
    write_lock,
    write_record,
)
from graftwork.retrieval.indexing import add_documents, analyse, build_part
from graftwork.retrieval.ranking import PRUNE_FROM, Ranking
from graftwork.retrieval.retriever import (
    ENGINE_SCALE,
    DamagedIndexError,
    Hit,
    IncompleteIndexError,
    Passage,
    check_k,
    check_record,
    fingerprint,
)

COMMIT_PASSAGES = 50_000
"""Number of passages between commits; at most this many are indexed again after a kill."""
_OPEN_ATTEMPTS = 5


class EmbeddedIndex:
    """Index in a folder, for searching, adding and deleting passages.

    Scores are Lucene's BM25: field lengths are stored in one byte (exact up to 40, rounded down above), and passages
    with an empty field are included in the number of passages and in the mean length. A deleted passage is no longer
    found, but is included in these two numbers until its segment is merged.

    Args:
        folder: Folder of the index.
        allow_incomplete: Open an index whose build was not completed.
        threads: Number of search threads; None for one per processor.
        verify: Read all files completely. Otherwise files above 1 MiB of indexes above 1 GiB are compared by size only.

    Raises:
        ConfigError: If the folder holds no index.
        IncompleteIndexError: If the index is incomplete or does not match its commit record.
        DamagedIndexError: If a file differs from its digest in the commit record, or from tantivy's checksum.
        MissingExtraError: If tantivy, regex, nltk or PyStemmer is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        allow_incomplete: bool = False,
        threads: int | None = None,
        verify: bool = False,
    ) -> None:
        self.folder = part_of(Path(folder)) if allow_incomplete else Path(folder)
        self.prune_from = PRUNE_FROM
        self._copy: Path | None = None
        self._content: bytes | None = None
        self._load(verify)
        self.warning = check_record(
            str(self.folder), self.record, self._searcher.num_docs, allow_incomplete=allow_incomplete
        )
        if self.warning is None and not has_digests(self.record):
            self.warning = (
                f"{self.folder} was written by an earlier version, without digests of its files; only tantivy's "
                "checksums were compared. The next change adds digests"
            )
        self._analyser = EnglishAnalyser()
        self._threads = threads or os.cpu_count() or 1

    def _load(self, verify: bool = False) -> None:
        """Read the commit record, compare the files with it, and open them."""
        verified: Mapping[str, Any] | None = None if self._content is None else self.record
        for attempt in range(_OPEN_ATTEMPTS):
            self._content = record_content(self.folder)
            self.record: dict[str, Any] = read_record(self.folder)
            try:
                if self.record.get("state") == "complete":
                    check_files(self.folder, self.record, deep=verify, verified=verified)
                self._open()
            except (DamagedIndexError, IncompleteIndexError):
                # another process may have changed the index between two reads, or is about to complete a change
                unchanged = "pending" not in self.record and read_record(self.folder) == self.record
                if unchanged or attempt + 1 == _OPEN_ATTEMPTS:
                    raise
                time.sleep(0.1 * (attempt + 1))
                continue
            if read_record(self.folder) == self.record:
                return

    def refresh(self) -> bool:
        """Move to the newest committed state; cheap if nothing was written. Return True if another process wrote.

        Raises:
            IncompleteIndexError: If the index does not match its commit record.
            DamagedIndexError: If a file differs from its digest in the commit record; the next call compares again.
        """
        # the folder is absent for a moment while a new build replaces it
        if (content := record_content(self.folder)) is None or content == self._content:
            return False
        try:
            self._load()
            check_record(str(self.folder), self.record, self._searcher.num_docs, allow_incomplete=False)
        except GraftworkError:
            self._content = None
            raise
        return True

    def reopened(self) -> EmbeddedIndex:
        """Return another handle on the same index."""
        return EmbeddedIndex(self.folder, threads=self._threads)

    def _open(self) -> None:
        # opening takes a lock, which creates a file
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)
        self._copy = None
        if not is_writable(self.folder):
            self._copy = linked_copy(self.folder)
            finalize(self, shutil.rmtree, self._copy, ignore_errors=True)
        self._index = open_tantivy(self._copy or self.folder)
        self._refresh()

    def __len__(self) -> int:
        return self._searcher.num_docs

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="graftwork-search")

    def index_fingerprint(self) -> str:
        """Fingerprint of contents and scoring. See `Retriever`."""
        return fingerprint(len(self), int(self.record.get("source", {}).get("digest", "0"), 16))

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Best passages of each query, at most `k`; equal scores are sorted by id."""
        check_k(k)
        if len(queries) < 2 or self._threads == 1:
            return [self._search(query, k) for query in queries]
        share = -(-len(queries) // self._threads)
        parts = [queries[start : start + share] for start in range(0, len(queries), share)]

        def search(part: Sequence[str]) -> list[list[Hit]]:
            return [self._search(query, k) for query in part]

        return [hits for found in self._pool.map(search, parts) for hits in found]

    def passages(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Passages with the given ids, by id; missing ids are skipped."""
        from tantivy import Query

        schema = self._index.schema
        found: dict[str, Passage] = {}
        with tantivy_errors(self.folder):
            for name in ids:
                hits = self._searcher.search(Query.term_query(schema, "id", name), 1, count=False).hits
                if hits:
                    found[name] = self._passage(hits[0][1])
        return found

    def add(self, passages: Iterable[Passage]) -> int:
        """Add passages, replacing those with the same id, in one atomic commit.

        Returns:
            Number of new passages.

        Raises:
            DataError: If a passage has no id or no text, an id is given twice, or half a character has no other half.
            IndexLockedError: If another process changes the index.
            StorageError: If the disk is full.
            ConfigError: If the folder is read-only.
        """
        given = list(passages)
        for passage in given:
            if not passage.id or not passage.text.strip():
                raise DataError(f"Found passage {passage.id!r} without {'text' if passage.id else 'an id'}.")
            if (problem := surrogate_in(f"{passage.id}{passage.title}{passage.text}")) is not None:
                raise DataError(f"Found passage {passage.id!r} in which {problem}. Fix its text.")
        if len({passage.id for passage in given}) != len(given):
            raise DataError("Found an id twice among the passages to add; expected every id once.")
        with writing(self.folder):
            return self._change([passage.id for passage in given], given)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages; committed on return.

        Returns:
            Number of deleted passages.
        """
        with writing(self.folder):
            return -self._change(list(dict.fromkeys(ids)), [])

    def erase(self, ids: Iterable[str]) -> int:
        """Delete passages physically: rewrite every segment that contains one of them, or any deleted passage.

        Without ids, earlier deletions are removed from the files. The cost grows with the size of these segments.

        Returns:
            Number of deleted passages.
        """
        with writing(self.folder), self._locked():
            old = self.passages(list(dict.fromkeys(ids)))
            segments = segments_to_rewrite(self._index, self._searcher, self.folder, old)
            if segments:
                with self._committing(list(old.values()), []) as writer:
                    rewrite(self._searcher, self._index.schema, writer, segments, self._analyser, leave_out=set(old))
            with index_writer(self._index, self.folder) as writer:
                writer.garbage_collect_files()
            if holds_deleted(self.folder):
                raise DamagedIndexError(f"{self.folder} contains deleted passages after a rewrite. Build it again.")
        return len(old)

    def _change(self, out: Sequence[str], into: Sequence[Passage]) -> int:
        # analysed before the writer is taken: a passage that cannot be analysed changes nothing
        analysed = analyse(into, self._analyser)
        with self._locked():
            old = self.passages(out)
            with self._committing(list(old.values()), into) as writer:
                for name in old:
                    writer.delete_documents_by_term("id", name)
                add_documents(writer, analysed)
        return len(into) - len(old)

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Exclusive right to change the index, at its newest state."""
        if self._copy is not None:
            raise ConfigError(
                f"{self.folder} is read-only. Change its permissions, or build an index in another folder."
            )
        with write_lock(self.folder):
            if read_record(self.folder) != self.record:  # changed by another process
                self._load()
            self._refresh()
            self._complete_record()
            yield

    @contextmanager
    def _committing(self, out: Sequence[Passage], into: Sequence[Passage]) -> Generator[Any]:
        """Writer of a change, which is committed with its commit record at the end of the block."""
        digest = int(self.record["source"]["digest"], 16)
        digest = add_digest(add_digest(digest, *out, sign=-1), *into)
        after = {"count": self.record["count"] + len(into) - len(out), "digest": f"{digest:032x}"}
        # tantivy's commit and the commit record are two steps: with both counts recorded, the index is valid after a
        # kill between them
        self._write_record({**self.record, "pending": [after["count"]], "pending_digest": after["digest"]})
        faults.point("index.pending", self.folder)
        with index_writer(self._index, self.folder) as writer:
            yield writer
            writer.commit()
        faults.point("index.changed", self.folder)
        self._refresh()
        self._complete_record()

    def _complete_record(self) -> None:
        """Resolve a pending change in the commit record, by whether tantivy has committed it."""
        record = dict(self.record)
        pending, digest = record.pop("pending", None), record.pop("pending_digest", None)
        if pending is None:
            return
        if self._committed(record, pending[0]):
            record["count"] = pending[0]
            record["source"] = {**record["source"], "digest": digest}
        self._write_record(with_digests(self.folder, record))

    def _committed(self, record: Mapping[str, Any], pending: int) -> bool:
        if record["count"] != pending:
            return len(self) == pending
        # a replacement does not change the count, so the contents are compared
        total = 0
        for passage in self.all_passages():
            total = add_digest(total, passage)
        return f"{total:032x}" == self.record["pending_digest"]

    def all_passages(self) -> Iterator[Passage]:
        """All passages, in no particular order."""
        from tantivy import Query

        step = 1000
        for start in range(0, len(self), step):
            with tantivy_errors(self.folder):
                hits = self._searcher.search(Query.all_query(), step, count=False, offset=start).hits
                found = [self._passage(address) for _, address in hits]
            yield from found

    def _refresh(self) -> None:
        with tantivy_errors(self.folder):
            self._index.reload()
            self._searcher = self._index.searcher()

    def _write_record(self, record: Mapping[str, Any]) -> None:
        self.record = write_record(self.folder, record)
        self._content = record_content(self.folder)

    def _passage(self, address: Any) -> Passage:
        document = self._searcher.doc(address)
        text, title = (bytes(document.get_first(name) or b"").decode() for name in ("text", "title"))
        return Passage(document.get_first("id"), text, title)

    def _search(self, query: str, k: int) -> list[Hit]:
        terms = self._analyser.terms(query)
        if not terms:
            return []
        with tantivy_errors(self.folder):
            best = Ranking(self._searcher, self._index.schema, self._passage, self.prune_from).best(terms, k)
        best.sort(key=lambda item: (-item[0], item[1].id))
        return [
            Hit(passage.id, passage.title, passage.text, score / ENGINE_SCALE, rank)
            for rank, (score, passage) in enumerate(best[:k])
        ]


def build_embedded(
    corpus: str | Path, folder: str | Path, *, overwrite: bool = False, commit_passages: int = COMMIT_PASSAGES
) -> EmbeddedIndex:
    """Build an index of a corpus; an interrupted build resumes after its last commit.

    The corpus is streamed, so its size is limited only by the disk; eight bytes per id are kept in memory to detect
    duplicates, and sixteen for a moment.

    Args:
        corpus: A `.tsv` or `.jsonl` file, a folder of them, or a glob pattern.
        folder: Folder of the index. A complete index in it remains in use until the new one replaces it.
        overwrite: Replace a complete index.
        commit_passages: Number of passages between commits.

    Raises:
        ConfigError: If the folder holds a complete index and `overwrite` is False, or other files.
        DataError: If the corpus cannot be read, has no passage, or has changed since the build began.
        IncompleteIndexError: If the index does not hold all passages of the corpus.
        IndexLockedError: If another process builds the same index.
        StorageError: If the disk is full.
    """
    reader = CorpusReader(find_corpus(corpus))
    target = Path(folder)
    # a damaged record is read without --overwrite only, so that --overwrite replaces it
    if not overwrite and (target / RECORD_FILE).exists() and read_record(target).get("state") == "complete":
        raise ConfigError(f"Found a finished index in {target}. Pass --overwrite to build it anew, or --add to add.")
    recover_folder(target)
    part = target.with_name(f"{target.name}.part")
    with writing(part):
        record = build_part(reader, part, commit_passages)
        faults.point("index.built", part)
    if target.exists() and not (target / RECORD_FILE).exists() and any(target.iterdir()):
        raise ConfigError(f"Found files in {target} that are no index. Name another folder.")
    write_record(part, with_digests(part, record))
    if target.exists() and not (target / RECORD_FILE).exists():
        target.rmdir()
    swap_folder(part, target)
    return EmbeddedIndex(target)
