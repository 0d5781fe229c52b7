"""BM25 in OpenSearch 2 and 3."""

from __future__ import annotations

from graftwork.retrieval.server_build import Loading, build_opensearch
from graftwork.retrieval.server_client import OpenSearchServer, SearchServerError
from graftwork.retrieval.server_index import OpenSearchIndex

__all__ = ["Loading", "OpenSearchIndex", "OpenSearchServer", "SearchServerError", "build_opensearch"]
