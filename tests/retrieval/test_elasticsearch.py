"""Elasticsearch backend against a local fake server that fails on demand."""

from __future__ import annotations

import pytest

from fake_elasticsearch import FakeElasticsearch
from graftwork.errors import ConfigError
from graftwork.retrieval import IncompleteIndexError, Passage
from graftwork.retrieval.disk_space import reserved_bytes, size_text
from graftwork.retrieval.elasticsearch import (
    ElasticsearchIndex,
    ElasticsearchServer,
    Loading,
    SearchServerError,
    build_elasticsearch,
)
from graftwork.retrieval.retriever import DamagedIndexError

QUICK = Loading(batch=10, first_wait=0.01)


def passages(count: int, word: str = "old") -> list[Passage]:
    return [Passage(f"p{n:03}", f"{word} text {n}", f"title {n}") for n in range(count)]


@pytest.fixture
def in_service(fake: FakeElasticsearch, corpus) -> ElasticsearchServer:
    """A server with a finished index `wiki` of three passages."""
    server = ElasticsearchServer(fake.url, timeout=0.5)
    build_elasticsearch(corpus(*passages(3)), "wiki", server, loading=QUICK)
    return server


def test_a_build_is_verified_committed_and_put_into_service(fake, in_service):
    (name,) = fake.indexes
    index = fake.indexes[name]
    assert fake.aliases == {"wiki": name}
    assert index["mappings"]["_meta"]["state"] == "complete"
    assert index["mappings"]["_meta"]["count"] == len(index["docs"]) == 3
    assert {field["analyzer"] for field in index["mappings"]["properties"].values() if field["type"] == "text"} == {
        "english"
    }
    assert set(index["docs"]["p000"]) == {"id", "title", "txt"}
    # no replicas and no refreshes while loading, both afterwards
    created = next(value for method, path, value in fake.requests if method == "PUT" and path == f"/{name}")
    assert (created["settings"]["number_of_replicas"], created["settings"]["refresh_interval"]) == (0, "-1")
    assert (index["settings"]["number_of_replicas"], index["settings"]["refresh_interval"]) == (1, None)


def test_queries_have_the_form_of_the_original(fake, in_service):
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
        ({"read_only_after": 24}, SearchServerError, "rejected passage 'p024'.*flood-stage.*free some space"),
        ({"stall_after": 20}, SearchServerError, "stalled: no passage was acknowledged for 0.5 s, after 20"),
        ({"busy": 99}, SearchServerError, "accepted no more passages after 0"),
    ],
    ids=["short count", "read-only at 60 %", "stall", "always busy"],
)
def test_a_failing_build_raises_and_leaves_the_old_index_in_service(fake, in_service, corpus, faults, error, message):
    before = dict(fake.aliases)
    fake.faults = faults
    with pytest.raises(error, match=message):
        build_elasticsearch(corpus(*passages(40, "new")), "wiki", in_service, loading=QUICK)
    fake.faults = {}
    assert fake.aliases == before
    assert len(ElasticsearchIndex("wiki", in_service)) == 3
    # the same command resumes and succeeds
    index = build_elasticsearch(corpus(*passages(40, "new")), "wiki", in_service, loading=QUICK)
    assert len(index) == 40
    assert len(fake.indexes) == 2


@pytest.mark.parametrize("faults", [{"busy": 2}, {"busy_items": 2}], ids=["whole requests", "single items"])
def test_requests_to_a_busy_server_are_retried(fake, in_service, corpus, faults):
    fake.faults = dict(faults)
    assert len(build_elasticsearch(corpus(*passages(40, "new")), "wiki", in_service, loading=QUICK)) == 40
    assert set(fake.faults.values()) == {0}


def test_a_resumed_build_sends_passages_from_one_batch_before_the_last_record(fake, in_service, corpus):
    fake.faults = {"read_only_after": 230}
    new = corpus(*passages(260, "new"))
    with pytest.raises(SearchServerError, match="rejected passage"):
        build_elasticsearch(new, "wiki", in_service, loading=QUICK)
    fake.faults, fake.requests = {}, []
    assert len(build_elasticsearch(new, "wiki", in_service, loading=QUICK)) == 260
    sent = [action["create"]["_id"] for _, path, value in fake.requests if "_bulk" in path for action in value[::2]]
    # progress was recorded after 20 batches of 10; the last batch before it may have been acknowledged out of order
    assert sent == [f"p{number:03}" for number in range(190, 260)]


def test_the_old_index_is_removed_only_when_asked(fake, in_service, corpus):
    (old,) = fake.indexes
    removing = Loading(batch=10, remove_old=True)
    build_elasticsearch(corpus(*passages(5)), "wiki", in_service, loading=removing)
    assert old not in fake.indexes
    assert fake.aliases["wiki"] in fake.indexes


def test_an_uncommitted_index_is_refused_unless_allowed(fake, in_service, corpus):
    fake.faults = {"lose": True}
    with pytest.raises(IncompleteIndexError):
        build_elasticsearch(corpus(*passages(5)), "fresh", in_service, loading=QUICK)
    fake.faults = {}
    with pytest.raises(IncompleteIndexError, match="never finished"):
        ElasticsearchIndex("fresh", in_service)
    allowed = ElasticsearchIndex("fresh", in_service, allow_incomplete=True)
    assert "never finished" in (allowed.warning or "")
    fake.indexes[fake.aliases["wiki"]]["docs"].popitem()
    with pytest.raises(IncompleteIndexError, match="holds 2 passages; its commit record counts 3"):
        ElasticsearchIndex("wiki", in_service)


def test_a_disk_without_room_is_refused_before_anything_is_sent(fake, corpus):
    fake.free = 12e9  # of 100: 10 stay free by the watermark, 5 more by ours
    with pytest.raises(SearchServerError, match="free above its high watermark"):
        build_elasticsearch(corpus(*passages(5)), "wiki", ElasticsearchServer(fake.url), loading=QUICK)
    assert not fake.indexes


@pytest.mark.parametrize(
    ("watermark", "total", "headroom", "reserved"),
    [
        ("90%", 100e9, None, 10e9),
        ("90%", 4e12, None, 150e9),
        ("90%", 1.2e12, None, 120e9),
        ("90%", 4e12, "-1", 150e9),
        ("90%", 100e9, "20gb", 10e9),
        ("90%", 400e9, "20gb", 20 * (1 << 30)),
        ("0.9", 100e9, None, 10e9),
        ("5gb", 100e9, None, 5 * (1 << 30)),
    ],
)
def test_the_reserve_is_the_smaller_of_watermark_and_headroom(watermark, total, headroom, reserved):
    assert reserved_bytes(watermark, total, headroom) == pytest.approx(reserved)


@pytest.mark.parametrize("free", [15.5e9, 14.5e9])
def test_the_reserve_and_the_safety_margin_stay_free(fake, corpus, free):
    fake.free = free  # of 100: 10 by the watermark, 5 by the safety margin
    if free > 15e9:
        build_elasticsearch(corpus(*passages(5)), "wiki", ElasticsearchServer(fake.url), loading=QUICK)
        assert len(fake.indexes) == 1
    else:
        with pytest.raises(SearchServerError, match="free above its high watermark"):
            build_elasticsearch(corpus(*passages(5)), "wiki", ElasticsearchServer(fake.url), loading=QUICK)


def test_connection_settings_are_read_from_the_environment(fake, monkeypatch):
    monkeypatch.delenv("GRAFTWORK_ELASTICSEARCH_URL", raising=False)
    with pytest.raises(ConfigError, match="GRAFTWORK_ELASTICSEARCH_URL"):
        ElasticsearchServer.from_environment()
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


def test_an_unreachable_server_is_a_one_line_error(corpus):
    with pytest.raises(SearchServerError, match="did not open the index wiki"):
        ElasticsearchIndex("wiki", ElasticsearchServer("http://127.0.0.1:9"))


def test_sizes_have_the_unit_that_shows_them():
    shown = [size_text(one) for one in (0, 999, 1500, 3.7e6, 21.6e9)]
    assert shown == ["0 bytes", "999 bytes", "1.5 kB", "3.7 MB", "21.6 GB"]


def test_an_analyser_that_the_server_changes_is_refused(fake, in_service, corpus):
    fake.faults = {"other_english": True}
    with pytest.raises(DamagedIndexError, match="check of the terms of the probe text in title"):
        build_elasticsearch(corpus(*passages(5)), "fresh", in_service, loading=QUICK)
    with pytest.raises(DamagedIndexError, match="check of the terms of the probe text in title"):
        ElasticsearchIndex("wiki", in_service)


def test_a_passage_that_the_server_swaps_while_it_loads_is_found(fake, in_service, corpus):
    whole = fake.on_search

    def swapping(method, parts, value):
        docs = fake.indexes[parts[0]]["docs"]
        first, second = docs["p001"]["txt"], docs["p002"]["txt"]
        docs["p001"]["txt"], docs["p002"]["txt"] = second, first
        return whole(method, parts, value)

    fake.on_search = swapping
    with pytest.raises(IncompleteIndexError, match="digest of its passages differs"):
        build_elasticsearch(corpus(*passages(30)), "fresh", in_service, loading=QUICK)


def test_an_index_of_an_earlier_version_opens_with_a_warning(fake, in_service):
    meta = fake.indexes[fake.aliases["wiki"]]["mappings"]["_meta"]
    for name in ("uuid", "sequence"):
        del meta[name]
    assert "built by an earlier version" in (ElasticsearchIndex("wiki", in_service).warning or "")
