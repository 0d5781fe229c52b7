"""BM25 on this machine: a tantivy index in a folder, with our own analysis and a seal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from graftwork.core.files import read_json, write_json
from graftwork.core.progress import Progress
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
    check_seal,
    fingerprint,
)

SEAL_FILE = "index.json"
MEMORY_BYTES = 256 << 20
"""What the writer may hold before it writes a segment; the rest is memory-mapped."""
COMMIT_PASSAGES = 50_000
"""Passages after which a build is made safe; what a kill can cost."""
_ANALYSED_AT_ONCE = 1 << 14

Analysed = tuple[Passage, str, str]
"""A passage with the terms of its title and of its text."""

_FIELDS = ("title", "text")
_WRITER_THREADS = 2


class EmbeddedIndex:
    """An index in a folder, opened for searching, adding and deleting.

    Scores are BM25 as Lucene computes it: field lengths are stored in one byte, exact to 40 and rounded
    down above, and both the number of passages and the mean length count passages with an empty field as well. A
    deleted passage is found no more at once, and counts in those two numbers until its segment is merged.

    Args:
        folder: The index.
        allow_incomplete: Search what is there although the index was not finished.
        threads: Queries searched at once; by default one for each processor.

    Raises:
        ConfigError: If the folder holds no index.
        IncompleteIndexError: If the index was never finished, or holds another number of passages than it should.
        MissingExtraError: If tantivy, regex, nltk or PyStemmer is not installed.
    """

    def __init__(self, folder: str | Path, *, allow_incomplete: bool = False, threads: int | None = None) -> None:
        self.folder = _part_of(Path(folder)) if allow_incomplete else Path(folder)
        self.seal: dict[str, Any] = _read_seal(self.folder)
        self._index = _open(self.folder)
        self._index.reload()
        self._searcher = self._index.searcher()
        self.warning = check_seal(
            str(self.folder), self.seal, self._searcher.num_docs, allow_incomplete=allow_incomplete
        )
        self._analyser = EnglishAnalyser()
        self._threads = threads or os.cpu_count() or 1

    def __len__(self) -> int:
        return self._searcher.num_docs

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="graftwork-search")

    def index_fingerprint(self) -> str:
        """What names the contents and the way of scoring."""
        return fingerprint(len(self), int(self.seal.get("source", {}).get("digest", "0"), 16))

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For every query its best passages, at most `k`, equal scores in the order of ids."""
        check_k(k)
        if len(queries) < 2 or self._threads == 1:
            return [self._search(query, k) for query in queries]
        share = -(-len(queries) // self._threads)
        parts = [queries[start : start + share] for start in range(0, len(queries), share)]
        found = self._pool.map(lambda part: [self._search(query, k) for query in part], parts)
        return [hits for part in found for hits in part]

    def passages(self, ids: Iterable[str]) -> dict[str, Passage]:
        """The passages of these ids that are in the index."""
        from tantivy import Query

        schema, found = self._index.schema, {}
        for name in ids:
            hits = self._searcher.search(Query.term_query(schema, "id", name), 1, count=False).hits
            if hits:
                found[name] = self._passage(hits[0][1])
        return found

    def add(self, passages: Iterable[Passage]) -> int:
        """Add passages; one whose id is there already takes the other's place. One commit, all or nothing.

        Returns:
            How many passages are new.

        Raises:
            DataError: If a passage has no id or no text, or an id comes twice.
        """
        given = list(passages)
        for passage in given:
            if not passage.id or not passage.text.strip():
                raise DataError(f"Found passage {passage.id!r} without {'text' if passage.id else 'an id'}.")
        if len({passage.id for passage in given}) != len(given):
            raise DataError("Found an id twice among the passages to add; expected every id once.")
        return self._change([passage.id for passage in given], given)

    def delete(self, ids: Iterable[str]) -> int:
        """Take passages out of the index, for good once this returns.

        Returns:
            How many there were.
        """
        return -self._change(list(dict.fromkeys(ids)), [])

    def _change(self, out: Sequence[str], into: Sequence[Passage]) -> int:
        self._settle()
        old = self.passages(out)
        difference = len(into) - len(old)
        digest = int(self.seal["source"]["digest"], 16)
        digest = add_digest(add_digest(digest, *old.values(), sign=-1), *into)
        count = self.seal["count"]
        after = {"count": count + difference, "digest": f"{digest:032x}"}
        # tantivy's commit is one step, the seal another: with both counts in it, either side of a kill is whole
        self._write_seal({**self.seal, "pending": [after["count"]], "pending_digest": after["digest"]})
        writer = self._index.writer(MEMORY_BYTES, _WRITER_THREADS)
        for name in old:
            writer.delete_documents_by_term("id", name)
        _add(writer, _analysed(into, self._analyser))
        writer.commit()
        writer.wait_merging_threads()
        self._refresh()
        self._settle()
        return difference

    def _settle(self) -> None:
        """Let the seal say what the index holds, after a change that was, or was not, committed."""
        seal = dict(self.seal)
        pending, digest = seal.pop("pending", None), seal.pop("pending_digest", None)
        if pending is None:
            return
        if self._committed(seal, pending[0]):
            seal["count"] = pending[0]
            seal["source"] = {**seal["source"], "digest": digest}
        self._write_seal(seal)

    def _committed(self, seal: Mapping[str, Any], pending: int) -> bool:
        if seal["count"] != pending:
            return len(self) == pending
        # a replacement leaves the count as it was: only the contents tell
        total = 0
        for passage in self.all_passages():
            total = add_digest(total, passage)
        return f"{total:032x}" == self.seal["pending_digest"]

    def all_passages(self) -> Iterator[Passage]:
        """Every passage, in no particular order."""
        from tantivy import Query

        step = 1000
        for start in range(0, len(self), step):
            for _, address in self._searcher.search(Query.all_query(), step, count=False, offset=start).hits:
                yield self._passage(address)

    def _refresh(self) -> None:
        self._index.reload()
        self._searcher = self._index.searcher()

    def _write_seal(self, seal: Mapping[str, Any]) -> None:
        write_json(self.folder / SEAL_FILE, seal)
        self.seal = dict(seal)

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
            # equal scores come out by segment: all that tie with the last wanted one must be seen to be sorted
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
    """Build an index of a corpus; run again after a stop, it goes on behind the last passages that were made safe.

    The corpus is streamed, so its size is bounded by the disk alone; ids are remembered as eight bytes each to find one
    that comes twice.

    Args:
        corpus: A `.tsv` or `.jsonl` file, a folder or a pattern of them.
        folder: Where to build. A finished index there stays in service until the new one takes its place.
        overwrite: Build anew although there is a finished index of another corpus.
        commit_passages: Passages after which the work is made safe.

    Raises:
        ConfigError: If there is a finished index already and it was not to be overwritten.
        DataError: If the corpus cannot be read, has no passage, or changed since the build began.
        IncompleteIndexError: If the finished index does not hold what was read.
    """
    reader = CorpusReader(find_corpus(corpus))
    target = Path(folder)
    if (target / SEAL_FILE).exists() and _read_seal(target).get("state") == "complete" and not overwrite:
        raise ConfigError(f"Found a finished index in {target}. Pass --overwrite to build it anew, or --add to add.")
    from graftwork.core.files import recover_folder, swap_folder

    recover_folder(target)
    part = target.with_name(f"{target.name}.part")
    seal = _build(reader, part, commit_passages)
    if target.exists() and not (target / SEAL_FILE).exists() and any(target.iterdir()):
        raise ConfigError(f"Found files in {target} that are no index. Name another folder.")
    write_json(part / SEAL_FILE, seal)
    if target.exists() and not (target / SEAL_FILE).exists():
        target.rmdir()
    swap_folder(part, target)
    return EmbeddedIndex(target)


def _build(reader: CorpusReader, part: Path, commit_passages: int) -> dict[str, Any]:
    index = _open(part, create=True)
    started = read_json(part / SEAL_FILE) if (part / SEAL_FILE).exists() else {}
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
        part / SEAL_FILE, {**base, **{key: started[key] for key in ("marked", "marked_digest") if key in started}}
    )
    waiting: list[Passage] = []
    # reading and analysis go on while what was analysed is indexed and made safe
    with Progress("indexed", total=0) as progress, ThreadPoolExecutor(1, "graftwork-index") as line:

        def write(passages: Sequence[Analysed], mark: Mapping[str, Any] | None) -> None:
            _add(writer, passages)
            progress.advance(len(passages))
            if mark is not None:
                writer.commit()
                write_json(part / SEAL_FILE, {**base, **mark})

        pending = line.submit(write, (), None)
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
                pending = line.submit(write, analysed, mark)
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
    """Where a first build that was not finished lies; the folder itself if it was."""
    part = folder.with_name(f"{folder.name}.part")
    return part if not folder.exists() and (part / SEAL_FILE).exists() else folder


def _read_seal(folder: Path) -> dict[str, Any]:
    if not (folder / SEAL_FILE).exists():
        part = _part_of(folder)
        if part != folder:
            raise IncompleteIndexError(
                f"{folder} was never finished; what was built lies in {part}. Run `graftwork index` again to finish, "
                "or pass --allow-incomplete to search what is there."
            )
        raise ConfigError(f"Found no index in {folder}; expected {SEAL_FILE}. Build one with `graftwork index`.")
    return read_json(folder / SEAL_FILE)


def _open(folder: Path, *, create: bool = False) -> Any:
    try:
        from tantivy import Index, SchemaBuilder, TextAnalyzerBuilder, Tokenizer
    except ImportError:
        raise MissingExtraError("tantivy", "regrad") from None
    builder = SchemaBuilder().add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    for name in _FIELDS:
        # the text itself is only kept; it is found by its terms, which are analysed before they come here
        builder.add_bytes_field(name, stored=True)
        builder.add_text_field(f"{name}_terms", stored=False, tokenizer_name="blanks", index_option="freq")
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        index = Index(builder.build(), str(folder)) if create else Index.open(str(folder))
    except (ValueError, OSError) as error:
        raise IncompleteIndexError(f"{folder} cannot be opened as an index ({error}). Build it again.") from error
    # a registration lives in the object, not in the folder
    index.register_tokenizer("blanks", TextAnalyzerBuilder(Tokenizer.whitespace()).build())
    return index
