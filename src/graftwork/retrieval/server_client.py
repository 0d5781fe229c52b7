"""Connections to search servers: Elasticsearch 8 and 9, and OpenSearch 2 and 3, through their official clients."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, cast

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError

JSON_HEADERS = {"accept": "application/json", "content-type": "application/json"}
NDJSON_HEADERS = {"accept": "application/json", "content-type": "application/x-ndjson"}
Params = Mapping[str, str]
Body = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


class SearchServerError(GraftworkError, RuntimeError):
    """The server cannot be reached, rejects a request, or lost acknowledged data."""


class ServerResponseError(SearchServerError):
    """The server answered with an error.

    Args:
        status: HTTP status.
        reason: Reason given by the server.
        kind: Type of the error given by the server, such as cluster_block_exception.
    """

    def __init__(self, status: int, reason: str, kind: str = "") -> None:
        super().__init__(f"{reason} (status {status})")
        self.status, self.reason, self.kind = status, reason, kind


class ServerConnectionError(SearchServerError):
    """The server cannot be reached, or the connection was lost."""


class ServerTimeoutError(SearchServerError):
    """The server did not respond in time."""


class SearchClient(Protocol):
    """Client of one server; thread-safe."""

    def request(self, method: str, path: str, *, params: Params | None = None, body: Body = None) -> Any:
        """Send a request and return the decoded JSON of the response.

        Args:
            method: HTTP method.
            path: Path with a leading slash.
            params: Query parameters.
            body: Object, or a list of objects that are sent as lines of JSON.

        Raises:
            ServerResponseError: If the server answers with an error.
            ServerConnectionError: If the connection cannot be made or is lost.
            ServerTimeoutError: If the server does not respond in time.
        """
        ...


@dataclass(frozen=True, slots=True)
class SearchServer(ABC):
    """Connection settings of a search server."""

    url: str
    """Address with scheme and port."""
    api_key: str | None = None
    """Encoded API key of Elasticsearch; takes precedence over basic authentication."""
    user: str | None = None
    """User name for basic authentication."""
    password: str | None = None
    """Password for basic authentication."""
    ca_file: str | None = None
    """CA certificate file, for an https server with a private certificate authority."""
    timeout: float = 60.0
    """Request timeout in seconds."""

    product: ClassVar[str] = ""
    """Name of the server, for messages."""
    url_variable: ClassVar[str] = ""
    """Environment variable of the address."""

    @classmethod
    def from_environment(cls, **changes: Any) -> Self:
        """Read the URL variable and its siblings …_API_KEY, …_USER, …_PASSWORD, …_CA_FILE; `changes` override them.

        Raises:
            ConfigError: If the URL is not set.
        """
        prefix = cls.url_variable.removesuffix("URL")
        names = ("url", "api_key", "user", "password", "ca_file")
        found: dict[str, Any] = {name: value for name in names if (value := os.environ.get(f"{prefix}{name.upper()}"))}
        if "url" not in found:
            raise ConfigError(
                f"Found no {cls.url_variable} in the environment; expected an address such as http://localhost:9200. "
                "`docker compose up` in the repository starts a server there."
            )
        return cls(**{**found, **changes})

    @abstractmethod
    def connect(self) -> SearchClient:
        """Return a client.

        Raises:
            MissingExtraError: If the package of the client is not installed.
        """


class ElasticsearchServer(SearchServer):
    """Connection settings of an Elasticsearch server, version 8 or 9: GRAFTWORK_ELASTICSEARCH_URL and its siblings."""

    __slots__ = ()
    product, url_variable = "Elasticsearch", "GRAFTWORK_ELASTICSEARCH_URL"

    def connect(self) -> SearchClient:
        """Return a client of the package elasticsearch. See `SearchServer.connect`."""
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
        return _ElasticsearchClient(Elasticsearch(self.url, **options), self.url)


class OpenSearchServer(SearchServer):
    """Connection settings of an OpenSearch server, version 2 or 3: GRAFTWORK_OPENSEARCH_URL and its siblings."""

    __slots__ = ()
    product, url_variable = "OpenSearch", "GRAFTWORK_OPENSEARCH_URL"

    def connect(self) -> SearchClient:
        """Return a client of the package opensearch-py. See `SearchServer.connect`.

        Raises:
            ConfigError: If an API key is set, which OpenSearch does not have.
        """
        try:
            from opensearchpy import OpenSearch
        except ImportError:
            raise MissingExtraError("opensearch-py", "opensearch") from None
        if self.api_key:
            raise ConfigError("Found an API key for OpenSearch, which has none. Set a user and a password.")
        options: dict[str, Any] = {"timeout": self.timeout, "max_retries": 0, "retry_on_timeout": False}
        if self.user:
            options["http_auth"] = (self.user, self.password or "")
        if self.ca_file:
            options["ca_certs"] = self.ca_file
        return _OpenSearchClient(OpenSearch(self.url, **options), self.url)


@dataclass(frozen=True, slots=True)
class _ElasticsearchClient:
    client: Any
    url: str

    def request(self, method: str, path: str, *, params: Params | None = None, body: Body = None) -> Any:
        from elasticsearch import ApiError, ConnectionTimeout, TransportError, UnsupportedProductError

        headers, data = _encoded(body)
        try:
            response = self.client.perform_request(method, path, params=dict(params or {}), headers=headers, body=data)
        except UnsupportedProductError as error:
            raise SearchServerError(
                f"{self.url} is no Elasticsearch ({_first_line(error)}). For OpenSearch, use --backend opensearch."
            ) from error
        except ApiError as error:
            raise _response_error(int(error.meta.status), error.body) from error
        except ConnectionTimeout as error:
            raise ServerTimeoutError(f"{self.url} did not respond in time ({_first_line(error)})") from error
        except TransportError as error:
            raise _lost(self.url, error) from error
        return response.meta.status < 400 if method == "HEAD" else response.body


@dataclass(frozen=True, slots=True)
class _OpenSearchClient:
    client: Any
    url: str

    def request(self, method: str, path: str, *, params: Params | None = None, body: Body = None) -> Any:
        from opensearchpy import ConnectionError as LostError
        from opensearchpy import ConnectionTimeout, TransportError

        headers, data = _encoded(body)
        try:
            return self.client.transport.perform_request(
                method, path, params=dict(params or {}), headers=headers, body=data
            )
        except ConnectionTimeout as error:
            raise ServerTimeoutError(f"{self.url} did not respond in time ({_first_line(error)})") from error
        except LostError as error:
            raise _lost(self.url, error) from error
        except TransportError as error:
            raise _response_error(int(error.status_code), error.info) from error


def _encoded(body: Body) -> tuple[dict[str, str], Any]:
    if body is None or isinstance(body, Mapping):
        return JSON_HEADERS, body
    # lines of JSON are encoded here, because the two clients differ in how
    return NDJSON_HEADERS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in body).encode()


def _response_error(status: int, info: Any) -> ServerResponseError:
    error: Any = cast("Mapping[str, Any]", info).get("error", info) if isinstance(info, Mapping) else info
    kind = str(cast("Mapping[str, Any]", error).get("type", "")) if isinstance(error, Mapping) else ""
    return ServerResponseError(status, error_reason(error) or "no reason given", kind)


def _lost(url: str, error: BaseException) -> ServerConnectionError:
    return ServerConnectionError(f"lost the connection to {url} ({_first_line(error)})")


def error_reason(error: Any) -> str:
    """Reason in an error object of the server, in one line."""
    found: Any = error
    if isinstance(error, Mapping):
        found = cast("Mapping[str, Any]", error).get("reason", error)
    return " ".join(str(found).split())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
