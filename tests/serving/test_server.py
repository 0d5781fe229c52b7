"""Endpoints under load, with changes and failures: cases S1–S3, and invalid requests."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.regrad.text.requests import Question
from graftwork.serving.settings import ServeSettings, check_token
from serving.servers import (
    ENTITIES,
    blocked_model_thread,
    city_of,
    count_of,
    eventually,
    home_of,
    listening,
    open_decoder,
    open_toy,
)

TOKEN = "a-secret-of-the-tests"
TEXT = "who is the baker ?"
TOKENS = 8


@pytest.fixture(scope="module")
def many(decoder_place, decoder) -> Iterator[Any]:
    """Server of the decoder, for requests that do not change the bank."""
    service = open_decoder(decoder_place, decoder, max_body_bytes=20_000, queue_size=400)
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield service, client


def body(question: Question, max_new_tokens: int = TOKENS) -> dict[str, Any]:
    """Request body of a question."""
    asked = {
        "question": question.text,
        "top_k": question.count,
        "strength": question.strength,
        "adapter": question.adapter,
        "blind": not question.context,
        "max_new_tokens": max_new_tokens,
    }
    return asked if question.passages is None else {**asked, "passage_ids": list(question.passages)}


def alone(service: Any, questions: list[Question], max_new_tokens: int = TOKENS) -> list[Any]:
    return [service.answerer.answer([one], max_new_tokens=max_new_tokens)[0] for one in questions]


def mixed(count: int, seed: int) -> list[Question]:
    """Random questions: all combinations of passages, strength, context and adapter."""
    draw = random.Random(seed)
    questions = []
    for number in range(count):
        names = tuple(f"p{one}" for one in draw.sample(range(24), draw.randint(1, 4)))
        kinds: list[dict[str, Any]] = [
            {"passages": names},
            {"passages": names, "strength": draw.choice([0.0, 0.5, -1.0, 2.0])},
            {"passages": ()},
            {"count": draw.randint(1, 3)},
            {"passages": names, "adapter": False},
            {"passages": names, "context": True},
        ]
        questions.append(Question(f"who is number {number} ?", **draw.choice(kinds)))
    return questions


def test_50_concurrent_requests_equal_sequential_answers(many):
    service, client = many
    questions = [Question(TEXT, (f"p{number % 24}", f"p{(number + number // 24 + 1) % 24}")) for number in range(50)]
    expected = alone(service, questions)
    before = [count_of(client, f"graftwork_batch_questions_{part}") for part in ("sum", "count")]
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda one: client.post("/v1/answer", json=body(one)), questions))
    assert [one.status_code for one in replies] == [200] * 50
    assert [one.json()["answer"] for one in replies] == [one.text for one in expected]
    assert len({one.text for one in expected}) > 10
    # the answers were generated together
    rows, steps = (
        count_of(client, f"graftwork_batch_questions_{part}") - old
        for part, old in zip(("sum", "count"), before, strict=True)
    )
    assert rows / steps > 2


@pytest.mark.long
def test_200_requests_with_failures_and_disconnects_change_no_weight(many):
    service, client = many
    before, questions = service.answerer.weights_digest(), mixed(200, seed=3)
    expected = alone(service, questions)
    given_up = count_of(client, 'graftwork_given_up_total{reason="gone"}')
    draw, lock = random.Random(5), threading.Lock()

    def ask(number: int) -> tuple[int, Any]:
        with lock:
            kind = draw.random()
        if kind < 0.1:
            unknown = {**body(questions[number]), "passage_ids": ["nowhere"], "adapter": True, "strength": 1.0}
            return number, client.post("/v1/answer", json=unknown).status_code
        if kind < 0.15:
            return number, client.post(
                "/v1/answer", json={**body(questions[number]), "question": "baker " * 600}
            ).status_code
        if kind < 0.3:
            disconnect(client, {**body(questions[number]), "max_new_tokens": 200})
            return number, None
        reply = client.post("/v1/answer", json=body(questions[number]))
        return number, (reply.status_code, reply.json()["answer"])

    with ThreadPoolExecutor(8) as pool:
        found = dict(pool.map(ask, range(200)))
    answered = {number: one for number, one in found.items() if isinstance(one, tuple)}
    assert len(answered) > 100
    assert answered == {number: (200, expected[number].text) for number in answered}
    assert {one for one in found.values() if not isinstance(one, tuple)} == {404, 413, None}
    eventually(lambda: count_of(client, 'graftwork_given_up_total{reason="gone"}') >= given_up + 10)
    eventually(lambda: len(service.queue) == 0)
    assert service.queue.run_between_batches(service.answerer.weights_digest).result() == before


def disconnect(client: httpx.Client, asked: dict[str, Any], when: threading.Event | None = None) -> None:
    """Ask, and close the connection before the answer, at once or after an event."""
    url, content = client.base_url, json.dumps(asked).encode()
    head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        if when is not None:
            when.wait(30)


def test_waiting_question_of_a_disconnected_client_is_dropped(many):
    service, client = many
    gone = 'graftwork_given_up_total{reason="gone"}'
    before, tokens = count_of(client, gone), count_of(client, "graftwork_generated_tokens_total")
    with blocked_model_thread(service):
        disconnect(client, body(Question(TEXT, ("p1",))))
        eventually(lambda: count_of(client, gone) == before + 1)
    assert client.post("/v1/answer", json=body(Question(TEXT, ()), 1)).status_code == 200
    assert count_of(client, "graftwork_generated_tokens_total") == tokens + 1


def test_generation_stops_when_the_client_disconnects(many, monkeypatch):
    service, client = many
    asked = [Question(TEXT, (f"p{number}",)) for number in range(24)]
    long = next(one for one in asked if service.answerer.answer([one], max_new_tokens=60)[0].tokens == 60)
    step, begun = service.queue._decoder.step, threading.Event()

    def slow_step() -> None:
        begun.set()
        time.sleep(0.02)
        step()

    monkeypatch.setattr(service.queue._decoder, "step", slow_step)
    tokens = count_of(client, "graftwork_generated_tokens_total")
    disconnect(client, body(long, 60), begun)
    eventually(lambda: count_of(client, "graftwork_generated_tokens_total") > tokens)
    eventually(lambda: not service.queue._active)
    assert count_of(client, "graftwork_generated_tokens_total") - tokens < 60


def test_full_queue_and_timeout_are_reported_and_the_server_continues(decoder_place, decoder):
    service = open_decoder(decoder_place, decoder, queue_size=2, timeout=0.5)
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        asked = body(Question(TEXT, ("p1",)), 2)
        with blocked_model_thread(service), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.post, "/v1/answer", json=asked) for _ in range(2)]
            eventually(lambda: len(service.queue) == 2)
            refused = client.post("/v1/answer", json=asked)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "2 questions waiting" in refused.json()["error"]["message"]
            assert {one.result().status_code for one in waiting} == {504}
        assert client.post("/v1/answer", json=asked).status_code == 200
        assert count_of(client, 'graftwork_given_up_total{reason="timeout"}') == 2


def test_failing_row_does_not_fail_its_batch(many, monkeypatch):
    service, client = many
    join = service.queue._decoder.join

    def failing_join(rows: Any) -> Any:
        if any(one.update.question.text == "poison" for one in rows):
            raise MemoryError("too much for this row")
        return join(rows)

    expected = alone(service, [Question(TEXT, ("p3",))])[0].text
    monkeypatch.setattr(service.queue._decoder, "join", failing_join)
    with ThreadPoolExecutor(4) as pool:
        with blocked_model_thread(service):
            asked = [body(Question(text, ("p3",))) for text in (TEXT, "poison", TEXT)]
            waiting = [pool.submit(client.post, "/v1/answer", json=one) for one in asked]
            eventually(lambda: len(service.queue) == 3)
        replies = [one.result() for one in waiting]
    assert [one.status_code for one in replies] == [200, 500, 200]
    assert [replies[0].json()["answer"], replies[2].json()["answer"]] == [expected] * 2


def test_added_passages_are_used_and_deleted_ones_are_not_after_a_restart_too(toy, tmp_path: Path):
    place = toy.copy(tmp_path)
    asked = {"question": "e160", "top_k": 1}
    with listening(open_toy(place, page=False)) as address, httpx.Client(base_url=address, timeout=60) as client:
        before = client.post("/v1/answer", json=asked).json()
        assert (before["passages"], before["update_norm"]) == ([], 0.0)
        # any city but the one that the adapter answers without a passage
        city = "c1" if before["answer"] != "c1" else "c2"
        new = {"passages": [{"id": "a/new 'one'", "text": f"e160 lives in {city} ."}]}
        assert client.post("/v1/passages", json=new).json() == {
            "written": 1,
            "aliased": 0,
            "skipped": 0,
            "replaced": 0,
            "indexed": True,
        }
        assert client.post("/v1/passages", json=new).json()["skipped"] == 1
        found = client.post("/v1/answer", json=asked).json()
        assert found["answer"] == city
        assert [one["id"] for one in found["passages"]] == ["a/new 'one'"]
        assert found["update_norm"] > 0
        assert found["fingerprint"]["bank"] != before["fingerprint"]["bank"]
        assert client.get("/v1/bank/stats").json()["ids"] == len(ENTITIES) + 1
        assert client.delete("/v1/passages/a/new 'one'").json() == {"deleted": "a/new 'one'"}
        after = client.post("/v1/answer", json=asked).json()
        assert (after["answer"], after["passages"]) == (before["answer"], [])
        named = {"question": "e160", "passage_ids": ["a/new 'one'"]}
        assert client.post("/v1/answer", json=named).status_code == 404
        assert client.delete("/v1/passages/a/new 'one'").status_code == 404
    with listening(open_toy(place, page=False)) as address, httpx.Client(base_url=address, timeout=60) as client:
        again = client.post("/v1/answer", json=asked).json()
        assert (again["answer"], again["passages"]) == (before["answer"], [])
        assert client.post("/v1/answer", json=named).status_code == 404
        assert client.get("/v1/bank/stats").json()["ids"] == len(ENTITIES)


def test_requests_after_a_deletion_do_not_use_the_passage(toy, tmp_path: Path):
    place = toy.copy(tmp_path)
    with listening(open_toy(place, page=False)) as address, httpx.Client(base_url=address, timeout=60) as client:
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                client.post("/v1/answer", json={"question": "e100", "top_k": 1})

        others = [threading.Thread(target=load) for _ in range(3)]
        for one in others:
            one.start()
        for entity in (101, 102, 103):
            asked = {"question": f"e{entity}", "top_k": 1}
            assert client.post("/v1/answer", json=asked).json()["answer"] == city_of(entity)
            assert client.delete(f"/v1/passages/p{entity}").status_code == 200
            assert client.post("/v1/answer", json=asked).json()["passages"] == []
            client.post("/v1/passages", json={"passages": [as_json(home_of(entity, "c7"))]})
            assert client.post("/v1/answer", json=asked).json()["answer"] == "c7"
        stop.set()
        for one in others:
            one.join()


def test_retrieved_passage_without_gradient_is_left_out_and_listed(toy, tmp_path: Path):
    service = open_toy(toy.copy(tmp_path), page=False)
    asked = {"question": "e120", "top_k": 1}
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        service.changes.submit(lambda answerer: answerer.gradient_retriever.bank.delete(["p120"])).result()
        reply = client.post("/v1/answer", json=asked)
        assert (reply.status_code, reply.json()["passages"], reply.json()["missing"]) == (200, [], ["p120"])
        assert reply.json()["update_norm"] == 0
        named = client.post("/v1/answer", json={"question": "e120", "passage_ids": ["p120"]})
        assert (named.status_code, named.json()["error"]["type"]) == (404, "UnknownPassageError")
        # it can still be deleted from the index
        assert client.delete("/v1/passages/p120").status_code == 200
        assert client.post("/v1/answer", json=asked).json()["passages"] == []


def as_json(passage: Any) -> dict[str, str]:
    return {"id": passage.id, "text": passage.text, "title": passage.title}


def test_changed_weights_stop_all_answers(toy, tmp_path: Path):
    service = open_toy(toy.copy(tmp_path), check_every=1, page=False)
    asked = {"question": "e101", "top_k": 1}
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/v1/answer", json=asked).status_code == 200
        assert client.get("/healthz").json()["status"] == "ok"
        weight = service.answerer.model.model.norm.weight
        kept = weight[0].item()
        with torch.no_grad():
            weight[0] += 1e-3
        first = client.post("/v1/answer", json=asked)
        assert first.status_code == 503
        assert "weights that differ" in first.json()["error"]["message"]
        with torch.no_grad():
            weight[0] = kept
        chat = {"model": "run", "messages": [{"role": "user", "content": "e101"}]}
        for path, one in (("/v1/answer", asked), ("/v1/chat/completions", chat)):
            assert client.post(path, json=one).status_code == 503
        assert client.get("/healthz").status_code == 503
        assert count_of(client, "graftwork_healthy") == 0


@pytest.mark.parametrize(
    ("changed", "status", "words"),
    [
        ({"strength": "x"}, 422, "strength: found 'x'; Input should be a valid number"),
        ({"gamma": "x"}, 422, "gamma: found 'x'"),
        ({"question": ""}, 422, "question"),
        (
            {"question": "  "},
            422,
            "question: found '  '; found no text; expected at least one character that is not white space.",
        ),
        ({"question": "baker " * 600}, 413, "Shorten it"),
        ({"question": "x" * 9000}, 422, "9000 characters"),
        ({"passage_ids": ["p1", "nowhere"]}, 404, "'nowhere'"),
        ({"top_k": -1}, 422, "top_k"),
        ({"top_k": 65}, 422, "65 passages"),
        ({"max_new_tokens": 10_000}, 422, "10000 tokens"),
        ({"kind": "essay"}, 422, "kind"),
        ({"colour": 1}, 422, "colour"),
        ({"adapter": "no"}, 422, "adapter"),
    ],
)
def test_invalid_questions_are_rejected_with_a_reason(many, changed, status, words):
    _, client = many
    reply = client.post("/v1/answer", json={"question": TEXT, **changed})
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]
    assert client.post("/v1/answer", json=body(Question(TEXT, ("p1",)), 1)).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b'{"question": ', 400, "no JSON"),
        (b"[1]", 422, "body"),
        (b'{"question": "a", "strength": NaN}', 422, "strength"),
        (b'"' + b"x" * 30_000 + b'"', 413, "20000"),
        (b"\xff\xfe", 400, ""),
        (b"", 422, "body"),
        (b"[" * 15_000, 400, ""),
    ],
)
def test_malformed_bodies_are_rejected_with_a_reason(many, content, status, words):
    _, client = many
    for sent in (content, iter([content[:10_000], content[10_000:]])):
        reply = client.post("/v1/answer", content=sent, headers={"Content-Type": "application/json"})
        assert reply.status_code == status
        assert words in reply.json()["error"]["message"]
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("passages", "status", "words"),
    [
        ([], 422, "passages"),
        ([{"id": "", "text": "a"}], 422, "id"),
        ([{"id": "x", "text": "  "}], 422, "found no text"),
        ([{"id": "x", "text": "one"}, {"id": "x", "text": "two"}], 409, "twice"),
        ([{"id": "p1", "text": "quite another text"}], 409, "another text"),
        ([{"id": "x", "text": "long " * 14_000}], 413, "request of"),
        ([{"id": f"x{n}", "text": "one"} for n in range(65)], 422, "65 passages"),
    ],
)
def test_invalid_passages_are_rejected_with_a_reason(many, passages, status, words):
    service, client = many
    before = client.get("/v1/bank/stats").json()["ids"]
    reply = client.post("/v1/passages", json={"passages": passages})
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]
    assert client.get("/v1/bank/stats").json()["ids"] == before
    assert "x" not in service.answerer.gradient_retriever.retriever.passages(["x"])


def test_every_endpoint_but_healthz_requires_the_token(decoder_place, decoder):
    service = open_decoder(decoder_place, decoder)
    with listening(service, TOKEN) as address, httpx.Client(base_url=address, timeout=60) as client:
        calls = [
            ("POST", "/v1/answer"),
            ("POST", "/v1/passages"),
            ("DELETE", "/v1/passages/p1"),
            ("GET", "/metrics"),
            ("GET", "/v1/bank/stats"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/openapi.json"),
        ]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
            encoded = {name: value.encode("utf-8") for name, value in headers.items()}
            for method, path in calls:
                reply = client.request(method, path, headers=encoded, content=b"{")
                assert reply.status_code == 401
                assert "token" in reply.json()["error"]["message"]
        assert client.get("/healthz").status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert client.post("/v1/answer", json=body(Question(TEXT, ()), 1), headers=right).status_code == 200
        assert client.get("/v1/bank/stats", headers=right).json()["ids"] == 24


def test_cross_site_requests_to_a_server_without_token_are_rejected(many):
    _, client = many
    asked = json.dumps({"question": TEXT}).encode()
    port = client.base_url.port
    for host, status in ((f"evil.example:{port}", 403), (f"localhost:{port}", 422), ("[::1]", 422), ("", 403)):
        # a request that browsers send to other sites without a preflight request
        reply = client.post("/v1/answer", content=asked, headers={"Host": host, "Content-Type": "text/plain"})
        assert reply.status_code == status
    assert client.post("/v1/answer", content=asked).status_code == 422


def test_pages_of_listed_origins_only_may_read_answers(decoder_place, decoder):
    ours, theirs = "https://app.example.org", "https://evil.example"
    service = open_decoder(decoder_place, decoder, cors_origins=(ours,))
    with listening(service, TOKEN) as address, httpx.Client(base_url=address, timeout=60) as client:
        for origin, allowed in ((ours, ours), (theirs, None)):
            asked = {
                "Origin": origin,
                "Access-Control-Request-Method": "DELETE",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            preflight = client.options("/v1/passages", headers=asked)
            assert preflight.status_code == (200 if allowed else 400)
            assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
            headers = {"Authorization": f"Bearer {TOKEN}", "Origin": origin}
            reply = client.post("/v1/answer", json=body(Question(TEXT, ()), 1), headers=headers)
            assert reply.status_code == 200
            assert reply.headers.get("Access-Control-Allow-Origin") == allowed
            # a page can read errors as well, and needs the token
            refused = client.get("/v1/models", headers={"Origin": origin})
            assert (refused.status_code, refused.headers.get("Access-Control-Allow-Origin")) == (401, allowed)
    with listening(open_decoder(decoder_place, decoder)) as address:
        assert "Access-Control-Allow-Origin" not in httpx.get(f"{address}/v1/models", headers={"Origin": ours}).headers


def test_remote_hosts_require_a_token():
    assert check_token("127.0.0.1", None) is None
    assert check_token("0.0.0.0", TOKEN) == TOKEN
    with pytest.raises(ConfigError, match="GRAFTWORK_SERVE_TOKEN"):
        check_token("0.0.0.0", None)
    with pytest.raises(ConfigError, match="at least 8"):
        check_token("127.0.0.1", "short")
    assert check_token("127.0.0.1", None, ["https://app.example.org"]) is None
    with pytest.raises(ConfigError, match="every web page"):
        check_token("127.0.0.1", None, ["*"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"port": 70000}, "port"),
        ({"timeout": 0.0}, "timeout"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
        ({"max_choices": 0}, "max_choices"),
        ({"default_new_tokens": 300}, "not to be above"),
        ({"cors_origins": ("app.example.org",)}, "cors_origins"),
        ({"cors_origins": ("https://app.example.org/path",)}, "cors_origins"),
    ],
)
def test_out_of_range_settings_raise(settings, words):
    with pytest.raises(ConfigError, match=words):
        ServeSettings(**settings)


def test_unknown_paths_and_methods_have_the_same_error_format(many):
    _, client = many
    for reply, status in ((client.get("/v2"), 404), (client.get("/v1/answer"), 405)):
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, status)
    assert client.get("/v1/passages").headers["Allow"] == "DELETE, POST"
