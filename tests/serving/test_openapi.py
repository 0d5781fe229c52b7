"""All checks of schemathesis against the server, and the limits in its OpenAPI document."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.serving.app import create_app
from serving.servers import listening, open_decoder

CONFIG = Path(__file__).with_name("schemathesis.toml")
TOKEN = "a-secret-of-the-tests"
needs_schemathesis = pytest.mark.skipif(
    find_spec("schemathesis") is None, reason="schemathesis is not installed: pip install schemathesis"
)


def check(address: str, folder: Path, *options: str) -> tuple[int, str]:
    """Run all checks of schemathesis; return its exit code and its report."""
    program = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    command = [sys.executable, "-c", program, "--config-file", str(CONFIG), "run", f"{address}/openapi.json"]
    checks = ["--checks", "all", "--request-timeout", "60", "--continue-on-failure", "--no-color"]
    done = subprocess.run([*command, *checks, *options], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
@needs_schemathesis
def test_a_few_requests_of_schemathesis(decoder_place, decoder, tmp_path: Path):
    service = open_decoder(decoder_place.copy(tmp_path), decoder, default_new_tokens=2)
    with listening(service) as address:
        code, report = check(address, tmp_path, "--phases", "examples,fuzzing", "-n", "3", "--seed", "1")
    assert code == 0, report


@needs_schemathesis
@pytest.mark.long
@pytest.mark.parametrize("token", [None, TOKEN])
def test_all_checks_of_schemathesis(decoder_place, decoder, tmp_path: Path, token):
    service = open_decoder(decoder_place.copy(tmp_path), decoder, default_new_tokens=2)
    header = [] if token is None else ["--header", f"Authorization: Bearer {token}"]
    with listening(service, token) as address:
        code, report = check(address, tmp_path, *header, "-n", "100", "--seed", "1")
        assert httpx.get(f"{address}/healthz").json()["status"] == "ok"
    assert code == 0, report


@needs_schemathesis
def test_schemathesis_finds_an_undocumented_status(decoder_place, decoder, tmp_path: Path, monkeypatch):
    service = open_decoder(decoder_place, decoder)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a fault of the test")

    monkeypatch.setattr(service, "stats", fail)
    with listening(service) as address:
        code, report = check(address, tmp_path, "--phases", "fuzzing", "-n", "1", "--include-path", "/v1/bank/stats")
    assert code == 1
    assert "Server error" in report


def test_the_document_states_the_limits_of_this_server(decoder_place, decoder):
    service = open_decoder(
        decoder_place,
        decoder,
        max_new_tokens=30,
        max_passages=3,
        max_question_characters=40,
        max_passage_characters=50,
    )
    schemas = create_app(service).openapi()["components"]["schemas"]
    answer = schemas["AnswerRequest"]["properties"]
    bounds = {
        "max_new_tokens": (answer["max_new_tokens"]["anyOf"][0]["maximum"], 30),
        "top_k": (answer["top_k"]["anyOf"][0]["maximum"], 3),
    }
    lengths = {
        "question": answer["question"]["maxLength"],
        "text": schemas["NewPassage"]["properties"]["text"]["maxLength"],
    }
    assert lengths == {"question": 40, "text": 50}
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["decoder"]
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        asked = {"question": "w" * 40, "max_new_tokens": 1, "passage_ids": []}
        assert client.post("/v1/answer", json=asked).status_code == 200
        assert client.post("/v1/answer", json={**asked, "question": "w" * 41}).status_code == 422
        for name, (stated, limit) in bounds.items():
            assert stated == limit
            assert client.post("/v1/answer", json={**asked, name: limit}).status_code == 200
            assert client.post("/v1/answer", json={**asked, name: limit + 1}).status_code == 422
        for changed in ({"passage_ids": ["p1"] * 4}, {"question": " \n"}, {"choices": ["a"]}, {"kind": "choice"}):
            assert client.post("/v1/answer", json={**asked, **changed}).status_code == 422
        for part in ("text", "title"):
            new = {"passages": [{"id": "x", "text": "some text", part: "w" * 51}]}
            assert client.post("/v1/passages", json=new).status_code == 422


def test_the_document_asks_for_the_token_where_it_is_needed(decoder_place, decoder):
    service = open_decoder(decoder_place, decoder)
    document = create_app(service, token=TOKEN).openapi()
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert document["paths"]["/v1/answer"]["post"]["security"] == [{"token": []}]
    assert "securitySchemes" not in create_app(service).openapi()["components"]


@pytest.mark.parametrize("number", [5.0, 5])
def test_whole_numbers_may_have_a_fraction_of_zero(decoder_place, decoder, number):
    with listening(open_decoder(decoder_place, decoder)) as address:
        asked = {"question": "who ?", "max_new_tokens": number, "seed": number, "top_k": number, "temperature": 1}
        reply = httpx.post(f"{address}/v1/answer", json=asked, timeout=60)
        assert (reply.status_code, reply.json()["seed"]) == (200, 5)
        for wrong in (5.5, True, "5"):
            assert httpx.post(f"{address}/v1/answer", json={**asked, "seed": wrong}).status_code == 422


@pytest.mark.parametrize(("field", "right", "wrong"), [("echo", False, 0), ("best_of", 1, True)])
def test_numbers_are_no_booleans_and_booleans_no_numbers(decoder_place, decoder, field, right, wrong):
    asked = {"model": "decoder", "prompt": "e101", "max_tokens": 1}
    with listening(open_decoder(decoder_place, decoder)) as address:
        for value, status in ((right, 200), (None, 200), (wrong, 422)):
            reply = httpx.post(f"{address}/v1/completions", json={**asked, field: value}, timeout=60)
            assert reply.status_code == status, (value, reply.text)
