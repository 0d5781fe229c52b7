"""Embedded BM25 index: a tantivy index in a folder, with Lucene's English analysis and a commit record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from graftwork.core.files import read_json, write_json
from graftwork.core.progress import Progress
from graftwork.core.storage import disk_error, writing
from graftwork.errors import ConfigError, DataError, MissingExtraError
from graftwork.retrieval.analysis import ANALYSER, EnglishAnalyser
from graftwork.retrieval.corpus import CorpusReader, add_digest, find_corpus
from graftwork.retrieval.retriever import (
    ENGINE_SCALE,
    K1,
    TIE_BREAKER,
    B,
    Hit,
    IncompleteIndexError,
    Passage,
    check_k,
    check_record,
    fingerprint,
)

RECORD_FILE = "index.json"
"""File name of the commit record."""
MEMORY_BYTES = 256 << 20
"""Memory budget of the index writer before it writes a segment; the index itself is memory-mapped."""
COMMIT_PASSAGES = 50_000
"""Number of passages between commits; at most this many are indexed again after a kill."""
_ANALYSED_AT_ONCE = 1 << 14

Analysed = tuple[Passage, str, str]
"""Passage, terms of its title, terms of its text."""

_FIELDS = ("title", "text")
_WRITER_THREADS = 2


class EmbeddedIndex:
    """Index in a folder, for searching, adding and deleting passages.

    Scores are Lucene's BM25: field lengths are stored in one byte (exact up to 40, rounded down above), and passages
    with an empty field are included in the number of passages and in the mean length. A deleted passage is no longer
    found, but is included in these two numbers until its segment is merged.

    Args:
        folder: Folder of the index.
        allow_incomplete: Open an index whose build was not completed.
        threads: Number of search threads; None for one per processor.

    Raises:
        ConfigError: If the folder holds no index.
        IncompleteIndexError: If the index is incomplete or does not match its commit record.
        MissingExtraError: If tantivy, regex, nltk or PyStemmer is not installed.
    """

    def __init__(self, folder: str | Path, *, allow_incomplete: bool = False, threads: int | None = None) -> None:
        self.folder = _part_of(Path(folder)) if allow_incomplete else Path(folder)
        self.record: dict[str, Any] = _read_record(self.folder)
        self._index = _open(self.folder)
        self._index.reload()
        self._searcher = self._index.searcher()
        self.warning = check_record(
            str(self.folder), self.record, self._searcher.num_docs, allow_incomplete=allow_incomplete
        )
        self._analyser = EnglishAnalyser()
        self._threads = threads or os.cpu_count() or 1

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
            DataError: If a passage has no id or no text, or an id is given twice.
        """
        given = list(passages)
        for passage in given:
            if not passage.id or not passage.text.strip():
                raise DataError(f"Found passage {passage.id!r} without {'text' if passage.id else 'an id'}.")
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

    def _change(self, out: Sequence[str], into: Sequence[Passage]) -> int:
        self._complete_record()
        old = self.passages(out)
        difference = len(into) - len(old)
        digest = int(self.record["source"]["digest"], 16)
        digest = add_digest(add_digest(digest, *old.values(), sign=-1), *into)
        count = self.record["count"]
        after = {"count": count + difference, "digest": f"{digest:032x}"}
        # tantivy's commit and the commit record are two steps: with both counts recorded, the index is valid after a
        # kill between them
        self._write_record({**self.record, "pending": [after["count"]], "pending_digest": after["digest"]})
        writer = self._index.writer(MEMORY_BYTES, _WRITER_THREADS)
        for name in old:
            writer.delete_documents_by_term("id", name)
        _add(writer, _analysed(into, self._analyser))
        writer.commit()
        writer.wait_merging_threads()
        self._refresh()
        self._complete_record()
        return difference

    def _complete_record(self) -> None:
        """Resolve a pending change in the commit record, by whether tantivy has committed it."""
        record = dict(self.record)
        pending, digest = record.pop("pending", None), record.pop("pending_digest", None)
        if pending is None:
            return
        if self._committed(record, pending[0]):
            record["count"] = pending[0]
            record["source"] = {**record["source"], "digest": digest}
        self._write_record(record)

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
            for _, address in self._searcher.search(Query.all_query(), step, count=False, offset=start).hits:
                yield self._passage(address)

    def _refresh(self) -> None:
        self._index.reload()
        self._searcher = self._index.searcher()

    def _write_record(self, record: Mapping[str, Any]) -> None:
        write_json(self.folder / RECORD_FILE, record)
        self.record = dict(record)

    def _passage(self, address: Any) -> Passage:
        document = self._searcher.doc(address)
        text, title = (bytes(document.get_first(name) or b"").decode() for name in ("text", "title"))
        return Passage(document.get_first("id"), text, title)

    def _search(self, query: str, k: int) -> list[Hit]:
        terms = self._analyser.terms(query)
        if not terms:
            return []
        parsed, wanted = self._query(terms), k + 1
        while True:
            found = self._searcher.search(parsed, wanted, count=False).hits
            # ties are ordered by segment: all hits that tie with rank k are fetched before sorting by id
            if len(found) < wanted or found[-1][0] < found[k - 1][0]:
                break
            wanted *= 2
        least = found[min(k, len(found)) - 1][0] if found else 0.0
        best = [(score, self._passage(address)) for score, address in found if score >= least]
        best.sort(key=lambda item: (-item[0], item[1].id))
        return [
            Hit(passage.id, passage.title, passage.text, score / ENGINE_SCALE, rank)
            for rank, (score, passage) in enumerate(best[:k])
        ]

    def _query(self, terms: Sequence[str]) -> Any:
        from tantivy import Occur, Query

        schema = self._index.schema
        fields = [
            Query.boolean_query(
                [(Occur.Should, Query.term_query(schema, f"{name}_terms", term, "freq")) for term in terms]
            )
            for name in _FIELDS
        ]
        return Query.disjunction_max_query(fields, TIE_BREAKER)


def build_embedded(
    corpus: str | Path, folder: str | Path, *, overwrite: bool = False, commit_passages: int = COMMIT_PASSAGES
) -> EmbeddedIndex:
    """Build an index of a corpus; an interrupted build resumes after its last commit.

    The corpus is streamed, so its size is limited only by the disk; eight bytes per id are kept in memory to detect
    duplicates.

    Args:
        corpus: A `.tsv` or `.jsonl` file, a folder of them, or a glob pattern.
        folder: Folder of the index. A complete index in it remains in use until the new one replaces it.
        overwrite: Replace a complete index.
        commit_passages: Number of passages between commits.

    Raises:
        ConfigError: If the folder holds a complete index and `overwrite` is False, or other files.
        DataError: If the corpus cannot be read, has no passage, or has changed since the build began.
        IncompleteIndexError: If the index does not hold all passages of the corpus.
    """
    reader = CorpusReader(find_corpus(corpus))
    target = Path(folder)
    if (target / RECORD_FILE).exists() and _read_record(target).get("state") == "complete" and not overwrite:
        raise ConfigError(f"Found a finished index in {target}. Pass --overwrite to build it anew, or --add to add.")
    from graftwork.core.files import recover_folder, swap_folder

    recover_folder(target)
    part = target.with_name(f"{target.name}.part")
    with writing(part):
        record = _build(reader, part, commit_passages)
    if target.exists() and not (target / RECORD_FILE).exists() and any(target.iterdir()):
        raise ConfigError(f"Found files in {target} that are no index. Name another folder.")
    write_json(part / RECORD_FILE, record)
    if target.exists() and not (target / RECORD_FILE).exists():
        target.rmdir()
    swap_folder(part, target)
    return EmbeddedIndex(target)


def _build(reader: CorpusReader, part: Path, commit_passages: int) -> dict[str, Any]:
    index = _open(part, create=True)
    started: dict[str, Any] = read_json(part / RECORD_FILE) if (part / RECORD_FILE).exists() else {}
    files = [{"name": path.name, "bytes": path.stat().st_size} for path in reader.files]
    if started and started.get("files") != files:
        raise DataError(
            f"{part} is the start of an index of other files ({started.get('files')}). Remove it to begin anew."
        )
    base = {"schema": 1, "state": "building", "files": files, "analyser": ANALYSER, "similarity": _similarity()}
    index.reload()
    done = index.searcher().num_docs
    writer, analyser = index.writer(MEMORY_BYTES, _WRITER_THREADS), EnglishAnalyser()
    write_json(
        part / RECORD_FILE, {**base, **{key: started[key] for key in ("marked", "marked_digest") if key in started}}
    )
    waiting: list[Passage] = []
    # the next batch is read and analysed while the previous one is indexed and committed
    with Progress("indexed", total=0) as progress, ThreadPoolExecutor(1, "graftwork-index") as executor:

        def write(passages: Sequence[Analysed], mark: Mapping[str, Any] | None) -> None:
            _add(writer, passages)
            progress.advance(len(passages))
            if mark is not None:
                writer.commit()
                write_json(part / RECORD_FILE, {**base, **mark})

        pending = executor.submit(write, (), None)
        for passage in reader:
            if reader.count == started.get("marked") and f"{reader.digest:032x}" != started["marked_digest"]:
                raise DataError(f"The corpus changed since {part} was begun. Remove that folder to begin anew.")
            if reader.count <= done:
                continue
            waiting.append(passage)
            safe = reader.count % commit_passages == 0
            if safe or len(waiting) == _ANALYSED_AT_ONCE:
                analysed = _analysed(waiting, analyser)
                pending.result()
                mark = {"marked": reader.count, "marked_digest": f"{reader.digest:032x}"} if safe else None
                pending = executor.submit(write, analysed, mark)
                waiting.clear()
        pending.result()
        write(_analysed(waiting, analyser), None)
    if reader.count == 0:
        raise DataError(f"{reader.files[0]}: found no passage ({reader.malformed} malformed rows); expected some.")
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    if index.searcher().num_docs != reader.count:
        raise IncompleteIndexError(
            f"{part} holds {index.searcher().num_docs} passages after {reader.count} were read. The disk may be full; "
            "remove that folder and build again."
        )
    return {
        **base,
        "state": "complete",
        "count": reader.count,
        "source": reader.summary(),
        "complaints": reader.complaints,
    }


def _similarity() -> dict[str, float]:
    return {"k1": K1, "b": B, "tie_breaker": TIE_BREAKER}


def _analysed(passages: Sequence[Passage], analyser: EnglishAnalyser) -> list[Analysed]:
    titles = analyser.spaced_all([passage.title for passage in passages])
    texts = analyser.spaced_all([passage.text for passage in passages])
    return list(zip(passages, titles, texts, strict=True))


def _add(writer: Any, passages: Iterable[Analysed]) -> None:
    from tantivy import Document

    for passage, title, text in passages:
        document = Document()
        document.add_text("id", passage.id)
        document.add_bytes("title", passage.title.encode())
        document.add_bytes("text", passage.text.encode())
        document.add_text("title_terms", title)
        document.add_text("text_terms", text)
        writer.add_document(document)


def _part_of(folder: Path) -> Path:
    """Folder of an unfinished first build; `folder` itself if it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    return part if not folder.exists() and (part / RECORD_FILE).exists() else folder


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD_FILE).exists():
        part = _part_of(folder)
        if part != folder:
            raise IncompleteIndexError(
                f"{folder} was never finished; the partial index is in {part}. Run `graftwork index` again to finish, "
                "or pass --allow-incomplete to search the passages it has."
            )
        raise ConfigError(f"Found no index in {folder}; expected {RECORD_FILE}. Build one with `graftwork index`.")
    return read_json(folder / RECORD_FILE)


def _open(folder: Path, *, create: bool = False) -> Any:
    try:
        from tantivy import Index, SchemaBuilder, TextAnalyzerBuilder, Tokenizer
    except ImportError:
        raise MissingExtraError("tantivy", "regrad") from None
    builder = SchemaBuilder().add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    for name in _FIELDS:
        # the text is stored only; searches use the terms, which are analysed before indexing
        builder.add_bytes_field(name, stored=True)
        builder.add_text_field(f"{name}_terms", stored=False, tokenizer_name="blanks", index_option="freq")
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        index = Index(builder.build(), str(folder)) if create else Index.open(str(folder))
    except (ValueError, OSError) as error:
        raise disk_error(error, folder) or IncompleteIndexError(
            f"{folder} cannot be opened as an index ({error}). Build it again."
        ) from error
    # tokenizers are registered per index object; the folder does not store them
    index.register_tokenizer("blanks", TextAnalyzerBuilder(Tokenizer.whitespace()).build())
    return index
