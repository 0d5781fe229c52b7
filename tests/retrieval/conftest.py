from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_elasticsearch import FakeElasticsearch
from graftwork.retrieval import Passage, Retriever
from graftwork.retrieval.server_build import Loading, build_on_server
from graftwork.retrieval.server_client import ElasticsearchServer, OpenSearchServer, SearchServer
from graftwork.retrieval.server_index import ElasticsearchIndex, OpenSearchIndex, SearchServerIndex
from retrieval.opensearch_node import HeaderProxy, OpenSearchNode

Build = Callable[..., Retriever]


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes passages as JSON lines."""

    def write(*passages: Passage, name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        rows = [json.dumps({"_id": p.id, "text": p.text, "title": p.title}) + "\n" for p in passages]
        path.write_text("".join(rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSearchNode]:
    """A real OpenSearch node, shared by the tests of a process."""
    started = OpenSearchNode(tmp_path_factory.mktemp("opensearch"))
    started.start()
    yield started
    started.stop()


@pytest.fixture(params=["embedded", "opensearch", "elasticsearch"])
def build(request: pytest.FixtureRequest, corpus: Callable[..., Path], tmp_path: Path) -> Iterator[Build]:
    """Builds an index of passages with the engine under test."""
    if request.param == "embedded":
        from graftwork.retrieval.embedded import build_embedded

        yield lambda *passages, parts=1: build_embedded(
            corpus(*passages), tmp_path / "index", commit_passages=max(1, len(passages) // parts)
        )
        return
    kind, server, close = server_under_test(request.param, lambda: request.getfixturevalue("node"))
    alias = f"graftwork-test-{uuid.uuid4().hex[:12]}"
    yield lambda *passages, parts=1: build_on_server(
        kind, corpus(*passages), alias, server, loading=Loading(replicas=0, batch=max(1, len(passages) // parts))
    )
    client = server.connect()
    for name in client.request("GET", f"/{alias}-*"):
        client.request("DELETE", f"/{name}")
    close()


def server_under_test(
    name: str, node: Callable[[], OpenSearchNode]
) -> tuple[type[SearchServerIndex], SearchServer, Callable[[], None]]:
    """Index class, server and a function that closes it.

    The server of the environment variable, else the real OpenSearch node; for the client of Elasticsearch behind a
    proxy that adds the header by which that client recognises its server.
    """
    kind: type[SearchServerIndex] = OpenSearchIndex if name == "opensearch" else ElasticsearchIndex
    if os.environ.get(kind.server_class.url_variable):
        return kind, kind.server_class.from_environment(), lambda: None
    if name == "opensearch":
        return kind, OpenSearchServer(node().url), lambda: None
    proxy = HeaderProxy(node().url)
    return kind, ElasticsearchServer(proxy.url), proxy.close


@pytest.fixture
def fake() -> Iterator[FakeElasticsearch]:
    server = FakeElasticsearch()
    yield server
    server.close()
