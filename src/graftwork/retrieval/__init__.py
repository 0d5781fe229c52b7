"""Passage retrieval: one protocol, an embedded index, OpenSearch and Elasticsearch."""

from __future__ import annotations

from graftwork.retrieval.opening import open_index
from graftwork.retrieval.retriever import DamagedIndexError, Hit, IncompleteIndexError, Passage, Retriever

__all__ = ["DamagedIndexError", "Hit", "IncompleteIndexError", "Passage", "Retriever", "open_index"]
