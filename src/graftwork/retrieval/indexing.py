"""Analysis of passages and their addition to a tantivy index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graftwork.core import faults
from graftwork.core.progress import Progress
from graftwork.errors import DataError
from graftwork.retrieval.analysis import ANALYSER, EnglishAnalyser
from graftwork.retrieval.corpus import CorpusReader
from graftwork.retrieval.index_storage import (
    RECORD_FILE,
    index_writer,
    open_tantivy,
    read_record,
    tantivy_errors,
    write_record,
)
from graftwork.retrieval.retriever import K1, TIE_BREAKER, B, IncompleteIndexError, Passage

Analysed = tuple[Passage, str, str]
"""Passage, terms of its title, terms of its text."""

_ANALYSED_AT_ONCE = 1 << 14


def analyse(passages: Sequence[Passage], analyser: EnglishAnalyser) -> list[Analysed]:
    """Passages with the terms of title and text."""
    titles = analyser.spaced_all([passage.title for passage in passages])
    texts = analyser.spaced_all([passage.text for passage in passages])
    return list(zip(passages, titles, texts, strict=True))


def add_documents(writer: Any, passages: Iterable[Analysed]) -> None:
    """Add analysed passages to a writer."""
    from tantivy import Document

    for passage, title, text in passages:
        document = Document()
        document.add_text("id", passage.id)
        document.add_bytes("title", passage.title.encode())
        document.add_bytes("text", passage.text.encode())
        document.add_text("title_terms", title)
        document.add_text("text_terms", text)
        writer.add_document(document)


def index_all(
    reader: CorpusReader,
    writer: Any,
    part: Path,
    base: Mapping[str, Any],
    started: Mapping[str, Any],
    done: int,
    commit_passages: int,
) -> None:
    """Add the passages of a corpus to an index.

    Args:
        reader: The corpus.
        writer: Writer of the index.
        part: Folder of the index.
        base: Commit record without marks.
        started: Commit record of an interrupted build; empty for a new one.
        done: Number of passages that the index holds already.
        commit_passages: Number of passages between commits.

    Raises:
        DataError: If the corpus has no passage, or has changed since the build began.
    """
    analyser, waiting = EnglishAnalyser(), list[Passage]()
    # the next batch is read and analysed while the previous one is indexed and committed
    with Progress("indexed", total=0) as progress, ThreadPoolExecutor(1, "graftwork-index") as executor:

        def write(passages: Sequence[Analysed], mark: Mapping[str, Any] | None) -> None:
            add_documents(writer, passages)
            progress.advance(len(passages))
            if mark is not None:
                writer.commit()
                faults.point("index.marked", part)
                write_record(part, {**base, **mark})

        pending = executor.submit(write, (), None)
        for passage in reader:
            if reader.count == started.get("marked") and f"{reader.digest:032x}" != started["marked_digest"]:
                raise DataError(f"The corpus changed since {part} was begun. Remove that folder to begin anew.")
            if reader.count <= done:
                continue
            waiting.append(passage)
            safe = reader.count % commit_passages == 0
            if safe or len(waiting) == _ANALYSED_AT_ONCE:
                analysed = analyse(waiting, analyser)
                pending.result()
                mark = {"marked": reader.count, "marked_digest": f"{reader.digest:032x}"} if safe else None
                pending = executor.submit(write, analysed, mark)
                waiting.clear()
        pending.result()
        write(analyse(waiting, analyser), None)
    if reader.count == 0:
        raise DataError(f"{reader.files[0]}: found no passage ({reader.malformed} malformed rows); expected some.")


def build_part(reader: CorpusReader, part: Path, commit_passages: int) -> dict[str, Any]:
    """Index a corpus in a folder, or resume an interrupted call; return the commit record of the complete index.

    Args:
        reader: The corpus.
        part: Folder of the unfinished index.
        commit_passages: Number of passages between commits.

    Raises:
        DataError: If the folder holds the start of an index of other files.
        IncompleteIndexError: If the index does not hold all passages of the corpus.
    """
    index = open_tantivy(part, create=True)
    started = read_record(part) if (part / RECORD_FILE).exists() else {}
    files = [{"name": path.name, "bytes": path.stat().st_size} for path in reader.files]
    if started and started.get("files") != files:
        raise DataError(
            f"{part} is the start of an index of other files ({started.get('files')}). Remove it to begin anew."
        )
    base = {"state": "building", "files": files, "analyser": ANALYSER, "similarity": _similarity()}
    with index_writer(index, part) as writer:
        index.reload()
        write_record(part, {**base, **{key: started[key] for key in ("marked", "marked_digest") if key in started}})
        index_all(reader, writer, part, base, started, index.searcher().num_docs, commit_passages)
        writer.commit()
    with tantivy_errors(part):
        index.reload()
        count = index.searcher().num_docs
    if count != reader.count:
        raise IncompleteIndexError(
            f"{part} holds {count} passages after {reader.count} were read. The disk may be full; remove that folder "
            "and build again."
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
