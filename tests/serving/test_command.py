"""The command `graftwork serve`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.cli.app import run
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.serving.launch import open_service
from graftwork.serving.page import PageActions
from graftwork.serving.settings import TOKEN_VARIABLE, ServeSettings
from serving.servers import city_of, listening

TOKEN = "a-secret-of-the-tests"
FAILING = """
import sys
from graftwork.cli.app import run
from graftwork.serving.service import Service

async def fail(self):
    raise RuntimeError("\\x1b[2J 日本")

Service.stats = fail
sys.exit(run(sys.argv[1:]))
"""
"""The command line, with one endpoint that fails."""


@pytest.mark.slow
def test_command_serves_until_sigterm_and_logs_unexpected_errors_only(toy, tmp_path: Path):
    place = toy.copy(tmp_path)
    words = [
        sys.executable,
        "-c",
        FAILING,
        "serve",
        str(place.run),
        "--bank",
        str(place.bank),
        "--index",
        str(place.index),
        "--port",
        "0",
        "--no-page",
        "--default-new-tokens",
        "1",
    ]
    environment = {**os.environ, TOKEN_VARIABLE: TOKEN, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if "Serving" in line:
                    break
            found = re.search(r"Serving run at (http://127\.0\.0\.1:\d+)/v1/answer, token required", lines[-1])
            assert found, lines
            headers = {"Authorization": f"Bearer {TOKEN}"}
            asked = {"question": "e110", "top_k": 1}
            reply = httpx.post(f"{found[1]}/v1/answer", json=asked, headers=headers, timeout=60)
            assert reply.json()["answer"] == city_of(110)
            assert httpx.post(f"{found[1]}/v1/answer", json=asked, timeout=60).status_code == 401
            assert httpx.post(f"{found[1]}/v1/answer", content=b"{", headers=headers).status_code == 422
            url = httpx.URL(found[1])
            for sent in (b"GET /heal", b"no HTTP\r\n\r\n", b"POST /v1/answer HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
                with socket.create_connection((url.host, url.port)) as connection:
                    connection.sendall(sent)
            assert httpx.get(f"{found[1]}/v1/bank/stats", headers=headers).status_code == 500
        finally:
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read() if process.stderr else ""
            process.wait(60)
    # only the unexpected error is logged, without control codes, in the encoding of stderr
    assert log.startswith("Exception in ASGI application\n")
    assert "RuntimeError: \\x1b[2J \\u65e5\\u672c\n" in log
    assert "\x1b" not in log
    assert log.count("Exception in ASGI application") == 1
    assert log.rstrip().endswith("\\u672c")
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "no token"),
        (["--bank", "nowhere"], "no gradient bank in nowhere"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--timeout", "soon"], "timeout"),
    ],
)
def test_invalid_serve_options_print_an_error(toy, words, message, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert run(["serve", str(toy.run), "--port", "0", "--bank", str(toy.bank), *words]) == 2
    assert message in capsys.readouterr().err


def test_taken_port_fails_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "no-such-run", "--port", str(taken.getsockname()[1])]) == 2
    assert "Choose another port" in capsys.readouterr().err


def test_questions_without_an_index_must_name_passages(toy, tmp_path: Path):
    settings = ServeSettings(default_new_tokens=1, page=False)
    service = open_service(str(toy.run), settings, bank=str(toy.copy(tmp_path).bank))
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        bare = client.post("/v1/answer", json={"question": "e104"})
        assert (bare.status_code, "no index" in bare.json()["error"]["message"]) == (422, True)
        named = client.post("/v1/answer", json={"question": "e104", "passage_ids": ["p104"]}).json()
        assert named["answer"] == city_of(104)
        new = {"passages": [{"id": "new", "text": "e170 lives in c2 ."}]}
        assert client.post("/v1/passages", json=new).json()["indexed"] is False

        async def ask() -> list[Any]:
            return [shown async for shown in PageActions(service).ask("e104", "p104, new", 3, 1.0)][-1]

        base, _, shown, why, with_gradients, about, found = asyncio.run(ask())
        assert base != with_gradients
        assert (shown, why) == ("", "There is no index to read the passages' text from.")
        assert "step of length" in about
        assert [row[0] for row in found] == ["p104", "new"]


def test_bank_in_an_object_store_is_served_and_changed(toy, address: str):
    assert run(["bank", "merge", address, str(toy.bank)]) == 0
    service = open_service(str(toy.run), ServeSettings(default_new_tokens=1, page=False), bank=address)
    with listening(service) as server, httpx.Client(base_url=server, timeout=60) as client:

        def ask(*ids: str) -> httpx.Response:
            return client.post("/v1/answer", json={"question": "e104", "passage_ids": ids})

        assert ask("p104").json()["answer"] == city_of(104)
        new = {"passages": [{"id": "new", "text": "e104 lives in c2 ."}]}
        assert client.post("/v1/passages", json=new).json()["written"] == 1
        assert ask("new").json()["update_norm"] > 0
        assert client.delete("/v1/passages/p104").status_code == 200
        assert ask("p104").status_code == 404


def test_model_without_regrad_raises():
    with pytest.raises(ConfigError, match="Found no regrad on the model"):
        open_service(str(shipped_model("decoder")), ServeSettings())
