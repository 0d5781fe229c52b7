"""Opening of an index by backend and location."""

from __future__ import annotations

from pathlib import Path

from graftwork.errors import ConfigError
from graftwork.retrieval.retriever import Retriever

SERVERS = ("opensearch", "elasticsearch")
"""Backends of search servers."""
BACKENDS = ("embedded", *SERVERS)
"""All backends."""


def open_index(index: str | Path, backend: str | None = None, *, allow_incomplete: bool = False) -> Retriever:
    """Open an index for searching.

    Args:
        index: Folder of an embedded index, or name of an index in a search server.
        backend: embedded, opensearch or elasticsearch; None opens an embedded index.
        allow_incomplete: Open an index whose build was not completed.

    Raises:
        ConfigError: If the folder or the backend does not exist.
        IncompleteIndexError: If the index is incomplete and `allow_incomplete` is False.
    """
    if backend is None:
        backend = "embedded"
        path = Path(index)
        if not path.exists() and not path.with_name(f"{path.name}.part").exists():
            raise ConfigError(f"Found no index {index}. Build one with `graftwork index`, or name another backend.")
    if backend == "embedded":
        from graftwork.retrieval.embedded import EmbeddedIndex

        return EmbeddedIndex(index, allow_incomplete=allow_incomplete)
    if backend in SERVERS:
        from graftwork.retrieval import server_index

        kinds = {"elasticsearch": server_index.ElasticsearchIndex, "opensearch": server_index.OpenSearchIndex}
        return kinds[backend](str(index), allow_incomplete=allow_incomplete)
    raise unknown_backend(backend)


def unknown_backend(backend: str) -> ConfigError:
    """Return the error of a backend that does not exist."""
    return ConfigError(f"Found backend {backend!r}; expected {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
