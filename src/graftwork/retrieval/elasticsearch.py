"""BM25 in Elasticsearch: indexes that are built aside, verified, sealed, and only then put into service."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.retrieval.analysis import ANALYSER
from graftwork.retrieval.retriever import (
    ENGINE_SCALE,
    TIE_BREAKER,
    Hit,
    IncompleteIndexError,
    check_k,
    check_seal,
    fingerprint,
)

URL_VARIABLE = "GRAFTWORK_ELASTICSEARCH_URL"
QUERIES_AT_ONCE = 128

MAPPINGS: Mapping[str, Any] = {
    "dynamic": "strict",
    "properties": {
        "title": {"type": "text", "analyzer": "english"},
        "txt": {"type": "text", "analyzer": "english"},
        # the id once more as a value, because sorting by the built-in one is switched off on many servers
        "id": {"type": "keyword"},
    },
}


class ElasticsearchError(GraftworkError, RuntimeError):
    """The server cannot be reached, refuses, or did not do what it acknowledged."""


@dataclass(frozen=True, slots=True)
class Server:
    """How to reach an Elasticsearch, version 8 or 9."""

    url: str
    """Address with scheme and port."""
    api_key: str | None = None
    """Encoded API key; goes before a user's name."""
    user: str | None = None
    """Name for basic authentication."""
    password: str | None = None
    """Password of that user."""
    ca_file: str | None = None
    """Certificate authority of an https server whose certificate no public one has signed."""
    timeout: float = 60.0
    """Seconds after which a request that is not answered counts as failed."""

    @classmethod
    def from_environment(cls, **changes: Any) -> Server:
        """Read GRAFTWORK_ELASTICSEARCH_URL, …_API_KEY, …_USER, …_PASSWORD and …_CA_FILE.

        Raises:
            ConfigError: If there is no address.
        """
        prefix = URL_VARIABLE.removesuffix("URL")
        names = ("url", "api_key", "user", "password", "ca_file")
        found = {name: value for name in names if (value := os.environ.get(f"{prefix}{name.upper()}"))}
        if "url" not in found:
            raise ConfigError(
                f"Found no {URL_VARIABLE} in the environment; expected an address such as http://localhost:9200. "
                "`docker compose up` in the repository starts a server there."
            )
        return cls(**{**found, **changes})

    def connect(self) -> Any:
        """A client of the official package.

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
    """A sealed index in Elasticsearch, opened for searching.

    Args:
        name: The alias under which it is in service.
        server: How to reach the server; by default as the environment says.
        allow_incomplete: Search what is there although the index was not finished.

    Raises:
        ConfigError: If there is no such index.
        IncompleteIndexError: If the index was never finished, or holds another number of passages than it should.
        ElasticsearchError: If the server cannot be reached.
    """

    def __init__(self, name: str, server: Server | None = None, *, allow_incomplete: bool = False) -> None:
        self.name = name
        self.client = (server or Server.from_environment()).connect()
        with asking(f"open the index {name}"):
            found = behind(self.client, name) or building(self.client, name)
            if not found:
                raise ConfigError(f"Found no index {name} in Elasticsearch. Build it with `graftwork index`.")
            self.index = found[-1]
            self.seal = read_seal(self.client, self.index)
            self._count = int(self.client.count(index=self.index)["count"])
        self.warning = check_seal(name, self.seal, self._count, allow_incomplete=allow_incomplete)

    def __len__(self) -> int:
        return self._count

    def index_fingerprint(self) -> str:
        """What names the contents and the way of scoring."""
        return fingerprint(self._count, int(self.seal.get("source", {}).get("digest", "0"), 16))

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For every query its best passages, at most `k`, equal scores in the order of ids."""
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
        with asking(f"search {self.name}"):
            # the second phase of counting makes scores of several shards comparable
            answers = self.client.msearch(searches=searches, search_type="dfs_query_then_fetch")["responses"]
        return [self._hits(answer) for answer in answers]

    def _hits(self, answer: Mapping[str, Any]) -> list[Hit]:
        if "error" in answer:
            raise ElasticsearchError(f"{self.name} could not be searched: {reason(answer['error'])}.")
        hits = answer["hits"]["hits"]
        return [
            Hit(hit["_id"], hit["_source"].get("title", ""), hit["_source"]["txt"], hit["_score"] / ENGINE_SCALE, rank)
            for rank, hit in enumerate(hits)
        ]


class asking:  # noqa: N801 - reads as a word of a sentence: with asking("search"): …
    """Turns the client's exceptions into one line that says what was asked of the server."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, GraftworkError):
            return
        from elasticsearch import ApiError, NotFoundError, TransportError, UnsupportedProductError

        if isinstance(error, NotFoundError):
            raise ConfigError(f"Elasticsearch knows nothing to {self.what} with: {short(error)}.") from error
        if isinstance(error, UnsupportedProductError):
            raise ElasticsearchError(
                f"The server is no Elasticsearch ({short(error)}). OpenSearch needs a client of its own."
            ) from error
        if isinstance(error, ApiError | TransportError):
            raise ElasticsearchError(f"Elasticsearch did not {self.what}: {short(error)}.") from error


def reason(error: Any) -> str:
    """The reason inside an error object of the server."""
    return str(error.get("reason", error)) if isinstance(error, Mapping) else str(error)


def short(error: BaseException) -> str:
    """The first line of an exception."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def behind(client: Any, alias: str) -> list[str]:
    """The indexes that an alias names; an index of that very name counts as one."""
    if client.indices.exists_alias(name=alias):
        return sorted(client.indices.get_alias(name=alias).body)
    return [alias] if client.indices.exists(index=alias) else []


def building(client: Any, alias: str) -> list[str]:
    """The unfinished indexes of an alias, the newest last."""
    found = client.indices.get(index=f"{alias}-*", ignore_unavailable=True, allow_no_indices=True).body
    states = {name: value["mappings"].get("_meta", {}).get("state") for name, value in found.items()}
    return sorted(name for name, state in states.items() if state == "building")


def read_seal(client: Any, index: str) -> dict[str, Any]:
    """What the index says of itself; empty if it was not built here."""
    return dict(client.indices.get_mapping(index=index)[index]["mappings"].get("_meta", {}))


def write_seal(client: Any, index: str, seal: Mapping[str, Any]) -> None:
    """Keep a seal inside the index itself."""
    client.indices.put_mapping(index=index, meta=dict(seal))


def new_name(alias: str) -> str:
    """A versioned name, in the order of time, that nobody else has."""
    return f"{alias}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def base_seal(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The seal of an index whose building begins."""
    return {"schema": 1, "state": "building", "analyser": ANALYSER, "files": list(files), "loaded": 0}


def refuse(index: str, problem: str) -> IncompleteIndexError:
    """The error of a build that must not go into service."""
    return IncompleteIndexError(
        f"{index} was not put into service: {problem}. What was in service before still is; mend the cause and run the "
        "same command again."
    )
