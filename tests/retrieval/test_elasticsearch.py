"""The way of Elasticsearch against a local server that speaks its protocol and fails on demand."""

from __future__ import annotations

import pytest

from fake_elasticsearch import FakeElasticsearch
from graftwork.errors import ConfigError
from graftwork.retrieval import IncompleteIndexError, Passage
from graftwork.retrieval.elasticsearch import ElasticsearchError, ElasticsearchIndex, Server
from graftwork.retrieval.elasticsearch_build import Loading, build_elasticsearch

QUICK = Loading(batch=10, first_wait=0.01, sample=20)


def passages(count: int, word: str = "old") -> list[Passage]:
    return [Passage(f"p{n:03}", f"{word} text {n}", f"title {n}") for n in range(count)]


@pytest.fixture
def in_service(fake: FakeElasticsearch, corpus) -> Server:
    """A server with a finished index `wiki` of three passages."""
    server = Server(fake.url, timeout=0.5)
    build_elasticsearch(corpus(*passages(3)), "wiki", server, loading=QUICK)
    return server


def test_a_build_is_verified_sealed_and_put_into_service(fake, in_service):
    (name,) = fake.indexes
    index = fake.indexes[name]
    assert fake.aliases == {"wiki": name}
    assert index["mappings"]["_meta"]["state"] == "complete"
    assert index["mappings"]["_meta"]["count"] == len(index["docs"]) == 3
    assert {field["analyzer"] for field in index["mappings"]["properties"].values() if field["type"] == "text"} == {
        "english"
    }
    assert set(index["docs"]["p000"]) == {"id", "title", "txt"}
    # no copies and no refreshing while loading, both again afterwards
    created = next(value for method, path, value in fake.requests if method == "PUT" and path == f"/{name}")
    assert (created["settings"]["number_of_replicas"], created["settings"]["refresh_interval"]) == (0, "-1")
    assert (index["settings"]["number_of_replicas"], index["settings"]["refresh_interval"]) == (1, None)


def test_questions_are_asked_as_the_original_asks_them(fake, in_service):
    found = ElasticsearchIndex("wiki", in_service)
    answers = found.search(["old title:x", "nothing"] * 65, 2)
    assert len(answers) == 130
    assert [(hit.id, hit.rank, hit.score, hit.text) for hit in answers[0]] == [
        ("p000", 0, pytest.approx(1.0), "old text 0"),
        ("p001", 1, pytest.approx(1.0), "old text 1"),
    ]
    assert answers[1] == []
    searches = [value for _, path, value in fake.requests if "_msearch" in path]
    assert [len(value) // 2 for value in searches] == [128, 2]
    assert searches[0][1]["query"]["multi_match"] == {
        "query": "old title:x",
        "type": "best_fields",
        "fields": ["title", "txt"],
        "tie_breaker": 0.5,
    }
    assert searches[0][1]["size"] == 2


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"lose": True}, IncompleteIndexError, "holds 39 passages of 40"),
        ({"read_only_after": 24}, ElasticsearchError, "rejected passage 'p024'.*flood-stage.*free some space"),
        ({"stall_after": 20}, ElasticsearchError, "stalled: no passage was acknowledged for 0.5 s, after 20"),
        ({"busy": 99}, ElasticsearchError, "took no more passages after 0"),
    ],
    ids=["short count", "read-only at 60 %", "stall", "always busy"],
)
def test_a_failing_build_is_loud_and_leaves_the_old_index_in_service(fake, in_service, corpus, faults, error, message):
    before = dict(fake.aliases)
    fake.faults = faults
    with pytest.raises(error, match=message):
        build_elasticsearch(corpus(*passages(40, "new")), "wiki", in_service, loading=QUICK)
    fake.faults = {}
    assert fake.aliases == before
    assert len(ElasticsearchIndex("wiki", in_service)) == 3
    # the same command again goes on and succeeds
    index = build_elasticsearch(corpus(*passages(40, "new")), "wiki", in_service, loading=QUICK)
    assert len(index) == 40
    assert len(fake.indexes) == 2


@pytest.mark.parametrize("faults", [{"busy": 2}, {"busy_items": 2}], ids=["whole requests", "single items"])
def test_a_busy_server_is_asked_again(fake, in_service, corpus, faults):
    fake.faults = dict(faults)
    assert len(build_elasticsearch(corpus(*passages(40, "new")), "wiki", in_service, loading=QUICK)) == 40
    assert set(fake.faults.values()) == {0}


def test_the_old_index_is_removed_only_when_asked(fake, in_service, corpus):
    (old,) = fake.indexes
    removing = Loading(batch=10, remove_old=True, sample=20)
    build_elasticsearch(corpus(*passages(5)), "wiki", in_service, loading=removing)
    assert old not in fake.indexes
    assert fake.aliases["wiki"] in fake.indexes


def test_an_unsealed_index_is_refused_unless_allowed(fake, in_service, corpus):
    fake.faults = {"lose": True}
    with pytest.raises(IncompleteIndexError):
        build_elasticsearch(corpus(*passages(5)), "fresh", in_service, loading=QUICK)
    fake.faults = {}
    with pytest.raises(IncompleteIndexError, match="never finished"):
        ElasticsearchIndex("fresh", in_service)
    allowed = ElasticsearchIndex("fresh", in_service, allow_incomplete=True)
    assert "never finished" in (allowed.warning or "")
    fake.indexes[fake.aliases["wiki"]]["docs"].popitem()
    with pytest.raises(IncompleteIndexError, match="holds 2 passages; its seal says 3"):
        ElasticsearchIndex("wiki", in_service)


def test_a_disk_without_room_is_refused_before_anything_is_sent(fake, corpus):
    fake.free = 12e9  # of 100: 10 stay free by the watermark, 5 more by ours
    with pytest.raises(ElasticsearchError, match="free above its high watermark"):
        build_elasticsearch(corpus(*passages(5)), "wiki", Server(fake.url), loading=QUICK)
    assert not fake.indexes


def test_the_environment_says_how_to_reach_the_server(fake, monkeypatch):
    monkeypatch.delenv("GRAFTWORK_ELASTICSEARCH_URL", raising=False)
    with pytest.raises(ConfigError, match="GRAFTWORK_ELASTICSEARCH_URL"):
        Server.from_environment()
    monkeypatch.setenv("GRAFTWORK_ELASTICSEARCH_URL", fake.url)
    monkeypatch.setenv("GRAFTWORK_ELASTICSEARCH_USER", "elastic")
    monkeypatch.setenv("GRAFTWORK_ELASTICSEARCH_PASSWORD", "secret")
    with pytest.raises(ConfigError, match="Found no index nothing"):
        ElasticsearchIndex("nothing")
    assert fake.headers[-1]["authorization"] == "Basic ZWxhc3RpYzpzZWNyZXQ="  # elastic:secret, base64
    monkeypatch.setenv("GRAFTWORK_ELASTICSEARCH_API_KEY", "abc==")
    with pytest.raises(ConfigError):
        ElasticsearchIndex("nothing")
    assert fake.headers[-1]["authorization"] == "ApiKey abc=="


def test_a_server_that_is_not_there_is_one_clear_line(corpus):
    with pytest.raises(ElasticsearchError, match="did not open the index wiki"):
        ElasticsearchIndex("wiki", Server("http://127.0.0.1:9"))
