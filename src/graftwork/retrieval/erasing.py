"""Physical removal of deleted passages: the segments that contain them are written anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from graftwork.retrieval.analysis import EnglishAnalyser
from graftwork.retrieval.index_storage import committed_segments, tantivy_errors
from graftwork.retrieval.indexing import add_documents, analyse
from graftwork.retrieval.retriever import Passage

_AT_ONCE = 10_000


def segments_to_rewrite(index: Any, searcher: Any, folder: Path, ids: Collection[str]) -> Mapping[int, int]:
    """Return the segments that contain deleted passages or passages with these ids: number to count of documents.

    Args:
        index: Tantivy index.
        searcher: Its searcher, of the last commit.
        folder: Folder of the index.
        ids: Ids of indexed passages.
    """
    segments = committed_segments(folder)
    found = {number for number, one in enumerate(segments) if one["deletes"]}
    for name in ids:
        found.update(number for number, _ in _addresses(index.schema, searcher, name))
    return {number: int(segments[number]["max_doc"]) for number in sorted(found)}


def rewrite(
    searcher: Any,
    schema: Any,
    writer: Any,
    segments: Mapping[int, int],
    analyser: EnglishAnalyser,
    *,
    leave_out: Set[str],
) -> None:
    """Delete all passages of segments and add them again; a segment without passages is removed at the commit.

    Args:
        searcher: Searcher of the last commit.
        schema: Schema of the index.
        writer: Writer of the index; the caller commits.
        segments: Result of `segments_to_rewrite`.
        analyser: Analyser of the index.
        leave_out: Ids of passages that are not added again.
    """
    batch: list[Passage] = []
    for passage in _living(searcher, schema, segments):
        writer.delete_documents_by_term("id", passage.id)
        if passage.id not in leave_out:
            batch.append(passage)
        if len(batch) == _AT_ONCE:
            add_documents(writer, analyse(batch, analyser))
            batch = []
    add_documents(writer, analyse(batch, analyser))


def holds_deleted(folder: Path) -> bool:
    """True if segments of an index contain deleted passages."""
    return any(one["deletes"] for one in committed_segments(folder))


def _living(searcher: Any, schema: Any, segments: Mapping[int, int]) -> Iterator[Passage]:
    """Passages of segments that are not deleted."""
    from tantivy import DocAddress

    for segment, count in segments.items():
        for number in range(count):
            document = searcher.doc(DocAddress(segment, number))
            name = str(document.get_first("id"))
            # a deleted document is readable, but no search finds it
            if (segment, number) in _addresses(schema, searcher, name):
                text, title = (bytes(document.get_first(field) or b"").decode() for field in ("text", "title"))
                yield Passage(name, text, title)


def _addresses(schema: Any, searcher: Any, name: str) -> set[tuple[int, int]]:
    """Segment and number of the documents with an id."""
    from tantivy import Query

    with tantivy_errors(Path(name)):
        hits = searcher.search(Query.term_query(schema, "id", name), 8, count=False).hits
    return {(address.segment_ord, address.doc) for _, address in hits}
