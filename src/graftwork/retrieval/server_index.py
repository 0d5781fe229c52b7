"""BM25 in a search server: opening a committed index, comparing it with its commit record, and searching it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from graftwork.errors import ConfigError
from graftwork.retrieval.retriever import (
    ENGINE_SCALE,
    TIE_BREAKER,
    Hit,
    Passage,
    check_k,
    check_record,
    fingerprint,
)
from graftwork.retrieval.server_client import (
    ElasticsearchServer,
    OpenSearchServer,
    SearchClient,
    SearchServer,
    SearchServerError,
    ServerConnectionError,
    ServerResponseError,
    error_reason,
)
from graftwork.retrieval.server_record import check_commit, live_state, read_record

QUERIES_AT_ONCE = 128
"""Number of queries per multi-search request."""
REFRESH_SECONDS = 1.0
"""Seconds between two looks at whether the alias or the index has changed."""


class SearchServerIndex:
    """Committed index in a search server, for searching. Thread-safe.

    At opening, the index is compared with its commit record: UUID, mapping, terms of the probe texts, number of
    passages and sequence numbers, so that an index that was replaced, analysed differently or written to is refused.

    Args:
        name: Alias of the index.
        server: Connection settings; None reads them from the environment.
        allow_incomplete: Open an index whose build was not completed.

    Raises:
        ConfigError: If the index does not exist.
        IncompleteIndexError: If the index is incomplete, or holds another number of passages than its commit record.
        DamagedIndexError: If the index differs from its commit record in another way; the message names the check.
        SearchServerError: If the server cannot be reached.
    """

    server_class: ClassVar[type[SearchServer]] = SearchServer

    def __init__(self, name: str, server: SearchServer | None = None, *, allow_incomplete: bool = False) -> None:
        self.name, self.allow_incomplete = name, allow_incomplete
        self.product = self.server_class.product
        self.client = (server or self.server_class.from_environment()).connect()
        self._open()

    def __len__(self) -> int:
        return self._count

    def index_fingerprint(self) -> str:
        """Fingerprint of contents and scoring. See `Retriever`."""
        return fingerprint(self._count, int(self.record.get("source", {}).get("digest", "0"), 16))

    def refresh(self) -> bool:
        """Move to the index that the alias points to; looks at most once a second. Return True if it has changed.

        Raises:
            DamagedIndexError: If the index was written to after its commit.
            SearchServerError: If the server cannot be reached.
        """
        if time.monotonic() - self._looked < REFRESH_SECONDS:
            return False
        with translated_errors(f"look up the index {self.name}", self.product):
            moved = indexes_of(self.client, self.name)[-1:] != [self.index]
            state = None if moved else live_state(self.client, self.index)
        if not moved and state == self._state:
            self._looked = time.monotonic()
            return False
        self._open()
        return True

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Best passages of each query, at most `k`; equal scores are sorted by id."""
        check_k(k)
        found: list[list[Hit]] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            found += self._search(queries[start : start + QUERIES_AT_ONCE], k)
        return found

    def passages(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Passages with these ids; unknown ids are left out."""
        names = list(ids)
        if not names:
            return {}
        with translated_errors(f"read {self.name}", self.product):
            found = self.client.request("POST", f"/{self.index}/_mget", body={"ids": names})["docs"]
        return {
            one["_id"]: Passage(one["_id"], one["_source"]["txt"], one["_source"].get("title", ""))
            for one in found
            if one.get("found")
        }

    def _open(self) -> None:
        with translated_errors(f"open the index {self.name}", self.product):
            check_product(self.client, self.product)
            found = indexes_of(self.client, self.name) or unfinished_indexes(self.client, self.name)
            if not found:
                raise ConfigError(f"Found no index {self.name} in {self.product}. Build it with `graftwork index`.")
            self.index = found[-1]
            self.record = read_record(self.client, self.index)
            self._count = int(self.client.request("GET", f"/{self.index}/_count")["count"])
            self.warning = check_record(self.name, self.record, self._count, allow_incomplete=self.allow_incomplete)
            self._state = live_state(self.client, self.index)
            if self.warning is None:
                self.warning = check_commit(self.client, self.name, self.index, self.record, self._state)
        self._looked = time.monotonic()

    def _search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        searches: list[Mapping[str, Any]] = []
        for query in queries:
            matching = {"query": query, "type": "best_fields", "fields": ["title", "txt"], "tie_breaker": TIE_BREAKER}
            searches += [
                {"index": self.index},
                {
                    "query": {"multi_match": matching},
                    "size": k,
                    "sort": [{"_score": "desc"}, {"id": "asc"}],
                    "_source": ["title", "txt"],
                    "track_total_hits": False,
                },
            ]
        with translated_errors(f"search {self.name}", self.product):
            # dfs_query_then_fetch uses global term statistics, so that scores of all shards are comparable
            params = {"search_type": "dfs_query_then_fetch"}
            answers = self.client.request("POST", "/_msearch", params=params, body=searches)["responses"]
        return [self._hits(answer) for answer in answers]

    def _hits(self, answer: Mapping[str, Any]) -> list[Hit]:
        if "error" in answer:
            raise SearchServerError(f"{self.name} could not be searched: {error_reason(answer['error'])}.")
        hits = answer["hits"]["hits"]
        return [
            Hit(hit["_id"], hit["_source"].get("title", ""), hit["_source"]["txt"], hit["_score"] / ENGINE_SCALE, rank)
            for rank, hit in enumerate(hits)
        ]


class ElasticsearchIndex(SearchServerIndex):
    """Committed index in Elasticsearch. See `SearchServerIndex`."""

    server_class = ElasticsearchServer


class OpenSearchIndex(SearchServerIndex):
    """Committed index in OpenSearch. See `SearchServerIndex`."""

    server_class = OpenSearchServer


@contextmanager
def translated_errors(action: str, product: str) -> Generator[None, None, None]:
    """Add the action to errors of the client.

    Args:
        action: Action of the block, for messages: "search wiki".
        product: Name of the server.
    """
    try:
        yield
    except ServerResponseError as error:
        if error.status == 404:
            raise ConfigError(f"{product} has nothing to {action} with: {error}.") from error
        if "create-index" in error.reason:
            raise SearchServerError(
                f"{product} accepts no new index: {error}. Nodes block new indexes when their disks are nearly full. "
                'Free some space, then remove the block: PUT _cluster/settings {"persistent": '
                '{"cluster.blocks.create_index": null}}.'
            ) from error
        raise SearchServerError(f"{product} did not {action}: {error}.") from error
    except ServerConnectionError as error:
        raise ServerConnectionError(
            f"{product} did not {action}: {error}. Check that the server runs and is reachable, then run the same "
            "command again."
        ) from error
    except SearchServerError as error:
        if type(error) is SearchServerError:
            raise
        raise type(error)(f"{product} did not {action}: {error}.") from error


def check_product(client: SearchClient, product: str) -> None:
    """Verify that a server is of the expected product.

    Raises:
        SearchServerError: If it is another one.
    """
    found = client.request("GET", "/").get("version", {}).get("distribution", "elasticsearch")
    if product == "OpenSearch" and found != "opensearch":
        raise SearchServerError(f"The server is no OpenSearch, but {found}. Use --backend elasticsearch.")


def indexes_of(client: SearchClient, alias: str) -> list[str]:
    """Indexes of an alias, or the index with that name."""
    try:
        return sorted(client.request("GET", f"/_alias/{alias}"))
    except ServerResponseError as error:
        if error.status != 404:
            raise
    try:
        return [alias] if client.request("HEAD", f"/{alias}") else []
    except ServerResponseError as error:
        if error.status != 404:
            raise
    return []


def unfinished_indexes(client: SearchClient, alias: str) -> list[str]:
    """Unfinished indexes of an alias, newest last."""
    params = {"ignore_unavailable": "true", "allow_no_indices": "true"}
    found = client.request("GET", f"/{alias}-*", params=params)
    states = {name: value["mappings"].get("_meta", {}).get("state") for name, value in found.items()}
    return sorted(name for name, state in states.items() if state == "building")
