"""BM25 in Elasticsearch: an index is built under a new name, verified and committed before the alias is switched."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.retrieval.analysis import ANALYSER
from graftwork.retrieval.retriever import (
    ENGINE_SCALE,
    TIE_BREAKER,
    Hit,
    IncompleteIndexError,
    check_k,
    check_record,
    fingerprint,
)

URL_VARIABLE = "GRAFTWORK_ELASTICSEARCH_URL"
QUERIES_AT_ONCE = 128
"""Number of queries per multi-search request."""

MAPPINGS: Mapping[str, Any] = {
    "dynamic": "strict",
    "properties": {
        "title": {"type": "text", "analyzer": "english"},
        "txt": {"type": "text", "analyzer": "english"},
        # copy of the id as a keyword, because many servers disable sorting by _id
        "id": {"type": "keyword"},
    },
}


class ElasticsearchError(GraftworkError, RuntimeError):
    """The server cannot be reached, rejects a request, or lost acknowledged data."""


@dataclass(frozen=True, slots=True)
class Server:
    """Connection settings of an Elasticsearch server, version 8 or 9."""

    url: str
    """Address with scheme and port."""
    api_key: str | None = None
    """Encoded API key; takes precedence over basic authentication."""
    user: str | None = None
    """User name for basic authentication."""
    password: str | None = None
    """Password for basic authentication."""
    ca_file: str | None = None
    """CA certificate file, for an https server with a private certificate authority."""
    timeout: float = 60.0
    """Request timeout in seconds."""

    @classmethod
    def from_environment(cls, **changes: Any) -> Server:
        """Read GRAFTWORK_ELASTICSEARCH_URL, …_API_KEY, …_USER, …_PASSWORD and …_CA_FILE; `changes` override them.

        Raises:
            ConfigError: If the URL is not set.
        """
        prefix = URL_VARIABLE.removesuffix("URL")
        names = ("url", "api_key", "user", "password", "ca_file")
        found: dict[str, Any] = {name: value for name in names if (value := os.environ.get(f"{prefix}{name.upper()}"))}
        if "url" not in found:
            raise ConfigError(
                f"Found no {URL_VARIABLE} in the environment; expected an address such as http://localhost:9200. "
                "`docker compose up` in the repository starts a server there."
            )
        return cls(**{**found, **changes})

    def connect(self) -> Any:
        """Create a client of the official package.

        Raises:
            MissingExtraError: If the package is not installed.
        """
        try:
            from elasticsearch import Elasticsearch
        except ImportError:
            raise MissingExtraError("elasticsearch", "elasticsearch") from None
        options: dict[str, Any] = {"request_timeout": self.timeout, "max_retries": 0, "retry_on_timeout": False}
        if self.api_key:
            options["api_key"] = self.api_key
        elif self.user:
            options["basic_auth"] = (self.user, self.password or "")
        if self.ca_file:
            options["ca_certs"] = self.ca_file
        return Elasticsearch(self.url, **options)


class ElasticsearchIndex:
    """Committed index in Elasticsearch, for searching.

    Args:
        name: Alias of the index.
        server: Connection settings; None reads them from the environment.
        allow_incomplete: Open an index whose build was not completed.

    Raises:
        ConfigError: If the index does not exist.
        IncompleteIndexError: If the index is incomplete or does not match its commit record.
        ElasticsearchError: If the server cannot be reached.
    """

    def __init__(self, name: str, server: Server | None = None, *, allow_incomplete: bool = False) -> None:
        self.name = name
        self.client = (server or Server.from_environment()).connect()
        with translated_errors(f"open the index {name}"):
            found = indexes_of(self.client, name) or unfinished_indexes(self.client, name)
            if not found:
                raise ConfigError(f"Found no index {name} in Elasticsearch. Build it with `graftwork index`.")
            self.index = found[-1]
            self.record = read_record(self.client, self.index)
            self._count = int(self.client.count(index=self.index)["count"])
        self.warning = check_record(name, self.record, self._count, allow_incomplete=allow_incomplete)

    def __len__(self) -> int:
        return self._count

    def index_fingerprint(self) -> str:
        """Fingerprint of contents and scoring. See `Retriever`."""
        return fingerprint(self._count, int(self.record.get("source", {}).get("digest", "0"), 16))

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Best passages of each query, at most `k`; equal scores are sorted by id."""
        check_k(k)
        found: list[list[Hit]] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            found += self._search(queries[start : start + QUERIES_AT_ONCE], k)
        return found

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
        with translated_errors(f"search {self.name}"):
            # dfs_query_then_fetch uses global term statistics, so that scores of all shards are comparable
            answers = self.client.msearch(searches=searches, search_type="dfs_query_then_fetch")["responses"]
        return [self._hits(answer) for answer in answers]

    def _hits(self, answer: Mapping[str, Any]) -> list[Hit]:
        if "error" in answer:
            raise ElasticsearchError(f"{self.name} could not be searched: {error_reason(answer['error'])}.")
        hits = answer["hits"]["hits"]
        return [
            Hit(hit["_id"], hit["_source"].get("title", ""), hit["_source"]["txt"], hit["_score"] / ENGINE_SCALE, rank)
            for rank, hit in enumerate(hits)
        ]


@contextmanager
def translated_errors(action: str) -> Generator[None, None, None]:
    """Convert exceptions of the client into one-line Graftwork errors.

    Args:
        action: Action of the block, for messages: "search wiki".
    """
    try:
        yield
    except GraftworkError:
        raise
    except Exception as error:
        from elasticsearch import ApiError, NotFoundError, TransportError, UnsupportedProductError

        if isinstance(error, NotFoundError):
            raise ConfigError(f"Elasticsearch has nothing to {action} with: {first_line(error)}.") from error
        if isinstance(error, UnsupportedProductError):
            raise ElasticsearchError(
                f"The server is no Elasticsearch ({first_line(error)}). OpenSearch needs a client of its own."
            ) from error
        if isinstance(error, ApiError | TransportError):
            raise ElasticsearchError(f"Elasticsearch did not {action}: {first_line(error)}.") from error
        raise


def error_reason(error: Any) -> str:
    """Reason in an error object of the server."""
    if not isinstance(error, Mapping):
        return str(error)
    return str(cast("Mapping[str, Any]", error).get("reason", error))


def first_line(error: BaseException) -> str:
    """First line of the message of an exception."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def indexes_of(client: Any, alias: str) -> list[str]:
    """Indexes of an alias, or the index with that name."""
    if client.indices.exists_alias(name=alias):
        return sorted(client.indices.get_alias(name=alias).body)
    return [alias] if client.indices.exists(index=alias) else []


def unfinished_indexes(client: Any, alias: str) -> list[str]:
    """Unfinished indexes of an alias, newest last."""
    found = client.indices.get(index=f"{alias}-*", ignore_unavailable=True, allow_no_indices=True).body
    states = {name: value["mappings"].get("_meta", {}).get("state") for name, value in found.items()}
    return sorted(name for name, state in states.items() if state == "building")


def read_record(client: Any, index: str) -> dict[str, Any]:
    """Commit record of an index, stored in its mapping; empty if Graftwork did not build the index."""
    return dict(client.indices.get_mapping(index=index)[index]["mappings"].get("_meta", {}))


def write_record(client: Any, index: str, record: Mapping[str, Any]) -> None:
    """Store a commit record in the mapping of the index."""
    client.indices.put_mapping(index=index, meta=dict(record))


def new_name(alias: str) -> str:
    """Unique index name that sorts by creation time."""
    return f"{alias}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def new_record(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Commit record of a new, unfinished index."""
    return {"schema": 1, "state": "building", "analyser": ANALYSER, "files": list(files), "loaded": 0}


def verification_error(index: str, problem: str) -> IncompleteIndexError:
    """Create the error of a build that failed its verification."""
    return IncompleteIndexError(
        f"{index} was not put into service: {problem}. The previous index remains in service; fix the cause and run "
        "the same command again."
    )
