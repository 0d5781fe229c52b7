"""BM25 in Elasticsearch 8 and 9."""

from __future__ import annotations

from graftwork.retrieval.server_build import Loading, build_elasticsearch
from graftwork.retrieval.server_client import ElasticsearchServer, SearchServerError
from graftwork.retrieval.server_index import ElasticsearchIndex

__all__ = ["ElasticsearchIndex", "ElasticsearchServer", "Loading", "SearchServerError", "build_elasticsearch"]
