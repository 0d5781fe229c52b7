from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fake_elasticsearch import FakeElasticsearch
from graftwork.retrieval import Passage, Retriever

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


@pytest.fixture(params=["embedded", "elasticsearch"])
def build(request: pytest.FixtureRequest, corpus: Callable[..., Path], tmp_path: Path) -> Iterator[Build]:
    """Builds an index of passages with the engine under test."""
    if request.param == "embedded":
        from graftwork.retrieval.embedded import build_embedded

        yield lambda *passages, parts=1: build_embedded(
            corpus(*passages), tmp_path / "index", commit_passages=max(1, len(passages) // parts)
        )
        return
    if not os.environ.get("GRAFTWORK_ELASTICSEARCH_URL"):
        pytest.skip("no Elasticsearch; set GRAFTWORK_ELASTICSEARCH_URL to the address of one, see compose.yaml")
    from graftwork.retrieval.elasticsearch import Server
    from graftwork.retrieval.elasticsearch_build import Loading, build_elasticsearch

    alias = f"graftwork-test-{uuid.uuid4().hex[:12]}"
    yield lambda *passages, parts=1: build_elasticsearch(
        corpus(*passages), alias, loading=Loading(replicas=0, batch=max(1, len(passages) // parts))
    )
    client = Server.from_environment().connect()
    for name in client.indices.get(index=f"{alias}-*").body:
        client.indices.delete(index=name)


@pytest.fixture
def fake() -> Iterator[FakeElasticsearch]:
    server = FakeElasticsearch()
    yield server
    server.close()
