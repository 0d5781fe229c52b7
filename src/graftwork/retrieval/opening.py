"""Opening of an index by backend and location."""

from __future__ import annotations

from pathlib import Path

from graftwork.errors import ConfigError
from graftwork.retrieval.retriever import RETRIEVERS, Retriever

SERVERS = ("opensearch", "elasticsearch")
"""Backends of search servers."""
BACKENDS = ("embedded", *SERVERS)
"""All backends."""


def open_index(
    index: str | Path, backend: str | None = None, *, retriever: str | None = None, allow_incomplete: bool = False
) -> Retriever:
    """Open an index for searching.

    Args:
        index: Folder of an embedded index, or name of an index in a search server.
        backend: embedded, opensearch or elasticsearch; None opens an embedded index.
        retriever: bm25, dense or hybrid; None takes what the index was built for.
        allow_incomplete: Open an index whose build was not completed.

    Raises:
        ConfigError: If the folder or the backend does not exist, or the index has no vectors for the retriever.
        IncompleteIndexError: If the index is incomplete and `allow_incomplete` is False.
    """
    if backend is None:
        backend = "embedded"
        path = Path(index)
        if not path.exists() and not path.with_name(f"{path.name}.part").exists():
            raise ConfigError(f"Found no index {index}. Build one with `graftwork index`, or name another backend.")
    if retriever not in (None, *RETRIEVERS):
        raise ConfigError(f"Found retriever {retriever!r}; expected one of: {', '.join(RETRIEVERS)}.")
    if backend in SERVERS and retriever not in (None, "bm25"):
        raise ConfigError(f"Found retriever {retriever} with {backend}, which ranks by BM25. Use an embedded index.")
    if backend == "embedded" and retriever != "bm25" and (retriever is not None or has_vectors(index)):
        from graftwork.retrieval.vector_index import VectorIndex

        return VectorIndex(index, retriever)
    if backend == "embedded":
        from graftwork.retrieval.embedded import EmbeddedIndex

        return EmbeddedIndex(index, allow_incomplete=allow_incomplete)
    if backend in SERVERS:
        from graftwork.retrieval import server_index

        kinds = {"elasticsearch": server_index.ElasticsearchIndex, "opensearch": server_index.OpenSearchIndex}
        return kinds[backend](str(index), allow_incomplete=allow_incomplete)
    raise unknown_backend(backend)


def has_vectors(index: str | Path) -> bool:
    """True if dense or hybrid retrieval was built for an embedded index."""
    from graftwork.retrieval.vectors import RECORD_FILE, vectors_folder

    return (vectors_folder(index) / RECORD_FILE).exists()


def unknown_backend(backend: str) -> ConfigError:
    """Return the error of a backend that does not exist."""
    return ConfigError(f"Found backend {backend!r}; expected {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
