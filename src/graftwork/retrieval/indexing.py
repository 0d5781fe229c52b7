"""Analysis of passages and their addition to a tantivy index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graftwork.core import faults
from graftwork.core.progress import Progress
from graftwork.errors import DataError
from graftwork.retrieval.analysis import EnglishAnalyser
from graftwork.retrieval.corpus import CorpusReader
from graftwork.retrieval.index_storage import write_record
from graftwork.retrieval.retriever import Passage

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
