"""Hostile and broken clients: odd texts, numbers and ids, slow and closed connections; failures of the model thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from graftwork.serving.app import create_app
from graftwork.serving.page import PageActions
from serving.servers import blocked_model_thread, count_of, eventually, listening, open_decoder

TEXT = "who is the baker ?"
CASES = 60
"""Random requests for each route."""
ODD_TEXTS = ("\ud800", "a\udfffb", "\x00", "\x1b[2J", "\x85", "", " ", "%", "../..", "[/b]", "𝔘" * 40, "x" * 600, "\n")
ODD_NUMBERS = (-1, 0, 1, 1 << 31, 10**30, -(10**30), 1e308, 1e-320, 0.5, True)
ODD_IDS = ("a/b", "/a//b/", "a#b", "100%", "%2F", "a?b=c", "ä 日本", "..", ".", "a/../b", "it's", "a+b", "a,b")
SILENT = (
    b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{",
    b"POST /v1/passages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    b"\x16\x03\x01 no HTTP\r\n\r\n",
)


class PanicException(BaseException):
    """Substitute for the class of pyo3, which has no importable name."""


@pytest.fixture(scope="module")
def place(decoder_place, tmp_path_factory) -> Any:
    return decoder_place.copy(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def server(place, decoder) -> Iterator[Any]:
    """Server whose bank and index may be changed."""
    service = open_decoder(place, decoder, default_new_tokens=2, header_timeout=0.5, body_timeout=0.5)
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield service, client


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Post JSON in which lone surrogates are escaped, which httpx itself cannot encode."""
    return client.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})


def passage(**changed: Any) -> dict[str, Any]:
    return {"passages": [{"id": "new", "title": "a title", "text": "the baker is tall .", **changed}]}


def chat(**changed: Any) -> dict[str, Any]:
    return {"model": "decoder", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 2, **changed}


def message(content: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/passages", passage(title="half \ud800"), "title"),
        ("/v1/passages", passage(text="half \udc00 of it"), "text"),
        ("/v1/passages", passage(text="nul \x00 inside"), "text"),
        ("/v1/passages", passage(id="half\ud800"), "id"),
        ("/v1/passages", passage(id="two\nlines"), "id"),
        ("/v1/passages", passage(id="escape\x1b[2J"), "id"),
        ("/v1/passages", passage(id="line\u2028separator"), "id"),
        ("/v1/passages", {**passage(), "\ud800": 1}, ""),
        ("/v1/answer", {"question": "who \ud800"}, "question"),
        ("/v1/answer", {"question": TEXT, "kind": "choice", "choices": ["a", "b", "c", "d", "\ud800"]}, "choices"),
        ("/v1/answer", {"question": TEXT, "passage_ids": ["p1\n"]}, "passage_ids"),
        ("/v1/chat/completions", message("who \ud800"), "content"),
        ("/v1/chat/completions", message([{"type": "text", "text": "who \x00"}]), "text"),
        ("/v1/chat/completions", chat(stop=["\ud800"]), "stop"),
        ("/v1/chat/completions", chat(n=9), "9 answers"),
        ("/v1/chat/completions", chat(top_logprobs=2), "top_logprobs without logprobs"),
        ("/v1/chat/completions", chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        ("/v1/completions", {"model": "decoder", "prompt": " "}, "prompt"),
        ("/v1/completions", {"model": "decoder", "prompt": [TEXT] * 5, "n": 2}, "10 answers"),
        ("/v1/completions", {"model": "decoder", "prompt": TEXT, "echo": True}, "echo"),
        ("/v1/completions", {"model": "decoder", "prompt": TEXT, "logprobs": 6}, "logprobs"),
        ("/v1/completions", {"model": "decoder", "prompt": [1, 2]}, "prompt"),
        ("/v1/chat/completions", chat(model="\ud800"), "model"),
        ("/v1/chat/completions", chat(**{"unknown\ud800": 1}), ""),
        ("/v1/chat/completions", chat(unknown={"deep": ["\ud800"]}), ""),
        ("/v1/answer", {"question": TEXT, "strength": 1e9}, "strength"),
        ("/v1/answer", {"question": TEXT, "gamma": -101}, "gamma"),
        ("/v1/answer", {"question": TEXT, "seed": 1 << 63}, "seed"),
        ("/v1/answer", {"question": TEXT, "seed": -1}, "seed"),
        ("/v1/answer", {"question": TEXT, "temperature": 1e-300}, "temperature"),
        ("/v1/answer", {"question": TEXT, "temperature": 101}, "temperature"),
        ("/v1/answer", {"question": TEXT, "top_k": 1 << 40}, "top_k"),
        ("/v1/answer", {"question": TEXT, "max_new_tokens": 10**30}, "max_new_tokens"),
        ("/v1/chat/completions", chat(max_tokens=10**30), "max_tokens"),
        ("/v1/chat/completions", chat(seed=10**30), "seed"),
        ("/v1/chat/completions", chat(regrad={"strength": 1e30}), "strength"),
    ],
)
def test_texts_and_numbers_that_cannot_be_used_are_rejected(server, path, body, where):
    _, client = server
    reply = send(client, path, body)
    assert reply.status_code == 422
    assert where in reply.json()["error"]["message"]


def test_a_rejected_passage_leaves_later_changes_possible(server):
    _, client = server
    for bad in (passage(title="\ud800"), passage(id="x\ny"), passage(text="\x00")):
        assert send(client, "/v1/passages", bad).status_code == 422
    assert send(client, "/v1/passages", passage()).status_code == 200
    assert client.delete("/v1/passages/new").status_code == 200


@pytest.mark.parametrize("id", ODD_IDS)
def test_ids_of_printable_characters_are_usable_everywhere(server, id):
    _, client = server
    assert send(client, "/v1/passages", passage(id=id)).json()["indexed"] is True
    reply = send(client, "/v1/answer", {"question": TEXT, "passage_ids": [id]})
    assert [one["id"] for one in reply.json()["passages"]] == [id]
    assert client.delete("/v1/passages", params={"id": id}).json() == {"deleted": id}
    assert client.delete("/v1/passages", params={"id": id}).status_code == 404
    if "." not in id.split("/") and ".." not in id.split("/"):  # clients resolve dot segments of paths
        assert send(client, "/v1/passages", passage(id=id)).status_code == 200
        assert client.delete(f"/v1/passages/{quote(id, safe='')}").json() == {"deleted": id}


def test_the_page_rejects_the_same_texts(server):
    service, _ = server
    page = PageActions(service)
    assert "control character" in asyncio.run(page.add("two\nlines", "", "some text"))
    assert "half a character" in asyncio.run(page.add("one", "\ud800", "some text"))


def test_slow_headers_and_slow_bodies_are_timed_out(server):
    _, client = server
    for sent in SILENT[:3]:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
            began = time.monotonic()
            connection.sendall(sent)
            answer = b""
            while chunk := connection.recv(4096):
                answer += chunk
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - began < 10
    assert client.get("/healthz").status_code == 200


def test_a_client_that_trickles_headers_is_closed(server):
    _, client = server
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        began = time.monotonic()
        closed = False
        while not closed and time.monotonic() - began < 10:
            try:
                connection.sendall(b"X: y\r\n")
            except OSError:
                closed = True
            time.sleep(0.05)
        assert closed


def test_a_client_that_does_not_read_is_closed(server):
    _, client = server
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((client.base_url.host, client.base_url.port))
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012
            while time.monotonic() - began < 15:
                connection.sendall(request * 100)
                time.sleep(0.05)
    assert client.get("/healthz").status_code == 200


def test_idle_connections_outlast_those_of_clients(decoder_place, decoder):
    """A client that reuses a connection while the server closes it gets no response."""
    default = open_decoder(decoder_place, decoder).settings.keep_alive_timeout
    assert default > max(5.0, 60.0), "the idle time-outs of httpx and OpenAI's client, and of common proxies"
    service = open_decoder(decoder_place, decoder, keep_alive_timeout=1)
    with listening(service) as address:
        url = httpx.URL(address)
        connection = http.client.HTTPConnection(url.host, url.port, timeout=20)
        for _ in range(2):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read().startswith(b"{")
            time.sleep(0.3)
        began = time.monotonic()
        assert connection.sock.recv(4096) == b""
        assert 0.2 < time.monotonic() - began < 10
        connection.close()


def test_connections_above_the_limit_get_503(decoder_place, decoder):
    service = open_decoder(decoder_place, decoder, max_connections=4)
    with listening(service) as address, ExitStack() as stack:
        url = httpx.URL(address)
        for _ in range(4):
            stack.enter_context(socket.create_connection((url.host, url.port)))
        reply = httpx.get(f"{address}/healthz")
        assert reply.status_code == 503
        assert "4 open connections" in reply.json()["error"]["message"]
        stack.close()
        eventually(lambda: httpx.get(f"{address}/healthz").status_code == 200)


def test_clients_that_hang_up_leave_no_trace_in_the_log(server, caplog, capfd):
    service, client = server
    caplog.set_level(logging.WARNING)
    complete = json.dumps({"question": TEXT, "passage_ids": ["p1"], "max_new_tokens": 200}).encode()
    head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    streamed = json.dumps({**chat(), "stream": True}).encode()
    for sent in (
        *SILENT,
        f"{head}{len(complete)}\r\n\r\n".encode() + complete,
        f"{head}{len(streamed)}\r\n\r\n".replace("answer", "chat/completions").encode() + streamed,
    ):
        for _ in range(3):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(sent)
    time.sleep(1)
    eventually(lambda: len(service.queue) == 0)
    assert client.get("/healthz").status_code == 200
    assert [one for one in caplog.records if one.name.startswith(("uvicorn", "asyncio"))] == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [PanicException("out of bounds"), SystemExit(1), StopIteration(), asyncio.CancelledError()]
)
def test_the_model_thread_survives_an_exception_of_any_kind(server, monkeypatch, error):
    service, client = server

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    asked = {"question": TEXT, "passage_ids": ["p1"]}
    for owner, name in ((service.answerer, "decoding_row"), (service.answerer.gradient_retriever, "retrieve")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            reply = send(client, "/v1/answer", asked)
            assert (reply.status_code, reply.json()["error"]["type"]) == (500, "ModelThreadError")
        assert send(client, "/v1/answer", asked).status_code == 200
    with monkeypatch.context() as patched:
        patched.setattr(service.changes.answerer, "add_passages", fail)
        assert send(client, "/v1/passages", passage()).status_code == 500
    assert client.get("/healthz").json()["status"] == "ok"


def test_an_error_after_the_answers_fails_their_questions_only(server, monkeypatch):
    service, client = server
    failures = count_of(client, "graftwork_model_thread_failures_total")

    def fail(*arguments: Any) -> Any:
        raise PanicException("in the check")

    with monkeypatch.context() as patched:
        patched.setattr(service.answerer, "check_weights", fail)
        assert send(client, "/v1/answer", {"question": TEXT}).status_code == 500
    assert send(client, "/v1/answer", {"question": TEXT}).status_code == 200
    assert count_of(client, "graftwork_model_thread_failures_total") == failures + 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_thread_that_ends_is_reported_and_rejects_requests(decoder_place, decoder, monkeypatch):
    service = open_decoder(decoder_place, decoder)

    def fail() -> None:
        raise SystemExit

    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        with blocked_model_thread(service):
            monkeypatch.setattr(service.queue, "_work_once", fail)
        eventually(lambda: client.get("/healthz").status_code == 503)
        assert "model thread has ended" in client.get("/healthz").json()["found"]
        reply = send(client, "/v1/answer", {"question": TEXT})
        assert (reply.status_code, "Restart it" in reply.json()["error"]["message"]) == (503, True)
        assert client.get("/v1/bank/stats").status_code == 503


def routes(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation of an OpenAPI document."""
    return [(method, path, one) for path, entry in document["paths"].items() for method, one in entry.items()]


def example(schema: dict[str, Any], document: dict[str, Any], draw: random.Random) -> Any:
    """A random value for a JSON schema; one in twenty is of another kind."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if draw.random() < 1 / 20:
        return draw.choice([None, [], {}, draw.choice(ODD_TEXTS), draw.choice(ODD_NUMBERS)])
    if options := schema.get("anyOf"):
        return example(draw.choice(options), document, draw)
    if "const" in schema or "enum" in schema:
        return draw.choice(schema.get("enum") or [schema.get("const")])
    kind = schema.get("type")
    if kind == "object":
        required = schema.get("required", ())
        found = {
            name: example(one, document, draw)
            for name, one in schema.get("properties", {}).items()
            if name in required or draw.random() < 0.2
        }
        return {**found, draw.choice(ODD_TEXTS): 1} if draw.random() < 0.1 else found
    if kind == "array":
        return [example(schema["items"], document, draw) for _ in range(draw.randint(0, 3))]
    if kind in ("integer", "number"):
        return draw.choice([1, 2, 3, *ODD_NUMBERS])
    if kind == "boolean":
        return draw.random() < 0.5
    return draw.choice([TEXT, "p1", "decoder", "user", "some text", *ODD_TEXTS])


def test_every_route_returns_only_the_statuses_of_its_document(server):
    _, client = server
    document, draw, seen = client.get("/openapi.json").json(), random.Random(7), set()
    assert len(routes(document)) >= 8
    for method, path, operation in routes(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        for _ in range(CASES):
            url = path.replace("{id}", quote(draw.choice(["p0", *ODD_TEXTS]), safe="", errors="replace"))
            names = [one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"]
            params = {name: draw.choice(["p0", "", "x y", "\n"]) for name in names if draw.random() < 0.8}
            body = b"" if content is None else json.dumps(example(content, document, draw)).encode()
            if draw.random() < 0.1:
                body = body[: len(body) // 2]
            kind = {"Content-Type": draw.choice(["application/json"] * 5 + ["text/plain"])}
            reply = client.request(method, url, params=params, content=body, headers=kind)
            assert str(reply.status_code) in operation["responses"], (method, url, body, reply.text)
            assert reply.status_code < 500, (method, url, body, reply.text)
            if reply.status_code >= 400:
                assert reply.json()["error"]["code"] == reply.status_code
            seen.add((path, reply.status_code // 100))
    assert {("/v1/answer", 2), ("/v1/answer", 4), ("/v1/passages", 4), ("/v1/chat/completions", 4)} <= seen


def test_the_document_lists_errors_in_the_servers_own_shape(decoder_place, decoder):
    document = create_app(open_decoder(decoder_place, decoder)).openapi()
    for _, path, operation in routes(document):
        for status, entry in operation["responses"].items():
            if status >= "400" and path != "/healthz":
                assert entry["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody"), (path, status)


def real_panic() -> None:
    """Cause a panic of tantivy; its class is no subclass of Exception."""
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("text", stored=True)
    tantivy.Index(builder.build()).searcher().doc(tantivy.DocAddress(7, 7))


def test_a_panic_of_tantivy_is_no_exception():
    with pytest.raises(BaseException, match="out of bounds") as caught:
        real_panic()
    assert not isinstance(caught.value, Exception)


@pytest.mark.parametrize("owner", ["retriever", "answerer", "service"])
def test_a_panic_of_tantivy_fails_its_request_only(server, monkeypatch, owner):
    service, client = server
    index = service.answerer.gradient_retriever.retriever
    target, name = {
        "retriever": (type(index), "search"),  # on the model thread
        "answerer": (service.answerer, "decoding_row"),
        "service": (service, "question"),  # on the event loop
    }[owner]
    asked = {"question": TEXT, "top_k": 1}
    with monkeypatch.context() as patched:
        patched.setattr(target, name, lambda *arguments, **options: real_panic())
        for path, body in (("/v1/answer", asked), ("/v1/chat/completions", chat(regrad={"top_k": 1}))):
            reply = send(client, path, body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, 500)
            assert (reply.headers.get("Connection") == "close") == (owner == "service")
    assert send(client, "/v1/answer", asked).status_code == 200
    assert client.get("/healthz").json()["status"] == "ok"
