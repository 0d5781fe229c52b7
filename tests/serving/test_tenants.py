"""Several banks on one server: every token reaches its own bank and index only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.errors import ConfigError
from graftwork.serving.launch import open_tenant
from graftwork.serving.tenants import Tenants, TenantSettings, read_tenants, tenant_tokens
from regrad_engine import encoder_of, passages
from serving.servers import Place, fill, listening, open_decoder

TOKENS = {"main": "token-of-the-main-bank", "law": "token-of-law", "news": "token-of-news"}


@pytest.fixture(scope="module")
def server(decoder_place, decoder, tmp_path_factory) -> Iterator[Any]:
    """Address of a server with three banks, of which two hold other passages than the main one."""
    folder = tmp_path_factory.mktemp("tenants")
    service = open_decoder(decoder_place.copy(folder), decoder)
    tenants = []
    for seed, name in enumerate(("law", "news"), start=1):
        place = Place(folder, folder / name / "bank", folder / name / "index")
        place.bank.parent.mkdir()
        fill(place, encoder_of(decoder), passages(decoder, 4 + seed, seed=seed))
        found = TenantSettings(str(place.bank), str(place.index))
        tenants.append(open_tenant(service, name, found, TOKENS[name]))
    with listening(service, TOKENS["main"], tenants) as address:
        yield service, address


@pytest.fixture
def clients(server) -> Iterator[dict[str, httpx.Client]]:
    _, address = server
    opened = {
        name: httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        for name, token in TOKENS.items()
    }
    yield opened
    for client in opened.values():
        client.close()


def test_every_token_reaches_its_own_bank_and_index(clients, decoder):
    counts = {name: client.get("/v1/bank/stats").json()["ids"] for name, client in clients.items()}
    assert counts == {"main": 24, "law": 5, "news": 6}
    text = passages(decoder, 1, seed=1)[0].text
    found = {
        name: client.post("/v1/answer", json={"question": text, "top_k": 1}).json()["passages"]
        for name, client in clients.items()
    }
    assert found["law"][0]["id"] == "p0"
    assert found["law"][0]["score"] > max(one["score"] for name in ("main", "news") for one in found[name])
    new = {"passages": [{"id": "secret", "text": "the baker is here ."}]}
    assert clients["law"].post("/v1/passages", json=new).status_code == 200
    named = {"question": "who ?", "passage_ids": ["secret"]}
    asked = {name: client.post("/v1/answer", json=named).status_code for name, client in clients.items()}
    assert asked == {"main": 404, "law": 200, "news": 404}
    assert clients["news"].delete("/v1/passages/secret").status_code == 404
    assert clients["law"].delete("/v1/passages/secret", params={"erase": "true"}).status_code == 200


def test_tenants_share_one_batch_and_one_model(server, clients):
    service, _ = server
    models = {client.get("/v1/models").json()["data"][0]["id"] for client in clients.values()}
    assert models == {service.name}
    prints = {name: client.get("/v1/bank/stats").json()["fingerprint"]["model"] for name, client in clients.items()}
    assert len(set(prints.values())) == 1


def test_metrics_need_the_servers_own_token(clients):
    assert {name: client.get("/metrics").status_code for name, client in clients.items()} == {
        "main": 200,
        "law": 403,
        "news": 403,
    }
    wrong = clients["law"].get("/v1/models", headers={"Authorization": "Bearer token-of-nobody"})
    assert wrong.status_code == 401


def test_page_shows_the_bank_of_the_user(server):
    service, _ = server
    tenants = Tenants(service, "a-main-token")
    assert tenants.log_in("me", "a-main-token")
    assert not tenants.log_in("me", "")
    service_of_law: Any = object()
    from graftwork.serving.tenants import Tenant

    tenants = Tenants(service, "a-main-token", [Tenant("law", service_of_law, "a-law-token")])
    assert [tenants.log_in("law", word) for word in ("a-law-token", "a-main-token")] == [True, False]
    assert not tenants.log_in("me", "a-law-token")
    assert (tenants.named("law"), tenants.named("me")) == (service_of_law, service)


def test_file_of_tenants_and_their_tokens(tmp_path: Path):
    path = tmp_path / "tenants.yaml"
    path.write_text("law: {bank: banks/law, index: indexes/law}\nnews-2: {bank: banks/news}\n")
    found = read_tenants(str(path))
    assert found["law"] == TenantSettings("banks/law", "indexes/law")
    variables = {"GRAFTWORK_SERVE_TOKEN_LAW": "12345678", "GRAFTWORK_SERVE_TOKEN_NEWS_2": "abcdefgh"}
    assert tenant_tokens(list(found), "main-token", variables) == {"law": "12345678", "news-2": "abcdefgh"}
    for own, changed, words in (
        (None, {}, "no token of the server's own bank"),
        ("main-token", {"GRAFTWORK_SERVE_TOKEN_LAW": ""}, "GRAFTWORK_SERVE_TOKEN_LAW"),
        ("main-token", {"GRAFTWORK_SERVE_TOKEN_LAW": "short"}, "GRAFTWORK_SERVE_TOKEN_LAW; expected at least 8"),
        ("main-token", {"GRAFTWORK_SERVE_TOKEN_LAW": "abcdefgh"}, "one token for two tenants"),
        ("12345678", {}, "one token for two tenants"),
    ):
        with pytest.raises(ConfigError, match=words):
            tenant_tokens(list(found), own, {**variables, **changed})
    wrong = {"Law: {bank: a}": "names a tenant 'Law'", "law: a": "expected `bank", "{}": "no tenants"}
    for content, words in wrong.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_tenants(str(path))


def test_page_actions_stream_answers_and_keep_errors_where_they_happen(server):
    from graftwork.serving.page import PageActions

    service, _ = server
    actions = PageActions(service)

    async def ask(ids: str) -> list[list[Any]]:
        return [shown async for shown in actions.ask("who is the baker ?", ids, 2, 1.0)]

    shown = asyncio.run(ask("p1, p2"))
    final = shown[-1]
    assert len(shown) > 6
    assert all("new tokens" in final[number] for number in (1, 3, 5))
    assert "step of length" in final[5]
    assert [row[0] for row in final[6]] == ["p1", "p2"]
    # every answer grows from an empty text
    for number in (0, 2, 4):
        lengths = [len(one[number]) for one in shown[:-1]]
        assert lengths == sorted(lengths)
    # the pretrained model answers although the passage of the others is unknown
    broken = asyncio.run(ask("nowhere"))[-1]
    assert "new tokens" in broken[1]
    assert "nowhere" in broken[5]
    assert broken[4] == ""
