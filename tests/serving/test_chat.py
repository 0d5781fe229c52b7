"""OpenAI's client against the chat endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from graftwork.methods.regrad.text.requests import Question
from serving.servers import city_of, listening, open_decoder, open_toy

openai = pytest.importorskip("openai", reason="the client is not installed: pip install openai")

TOKEN = "a-secret-of-the-tests"


@pytest.fixture(scope="module")
def talking(decoder_place, decoder) -> Iterator[Any]:
    service = open_decoder(decoder_place, decoder)
    with (
        listening(service, TOKEN) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN, max_retries=0, timeout=60) as client,
    ):
        yield service, client


def user_message(content: Any) -> Any:
    return [{"role": "user", "content": content}]


def test_client_gets_answers_with_and_without_options(toy):
    service = open_toy(toy, page=False)
    with listening(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client:
        assert [one.id for one in client.models.list()] == ["run"]
        reply = client.chat.completions.create(
            model="run", messages=user_message("e105"), extra_body={"regrad": {"top_k": 1}}
        )
        assert reply.choices[0].message.content == city_of(105)
        about = reply.model_extra["regrad"]
        assert [one["id"] for one in about["passages"]] == ["p105"]
        assert about["ignored"] == []
        named = {"regrad": {"passage_ids": ["p107"]}}
        other = client.chat.completions.create(model="run", messages=user_message("e105"), extra_body=named)
        assert [one["id"] for one in other.model_extra["regrad"]["passages"]] == ["p107"]
        assert reply.usage.completion_tokens == 1


def test_last_message_is_answered_and_ignored_parts_are_listed(talking):
    service, client = talking
    questions = [Question("who is the baker ?", (f"p{number}",)) for number in range(24)]
    answers = service.answerer.answer(questions, max_new_tokens=6)
    number, expected = next((n, one) for n, one in enumerate(answers) if len(set(one.text.split())) > 1)
    history = [
        {"role": "system", "content": "be short"},
        *user_message("who ?"),
        {"role": "assistant", "content": "nobody"},
    ]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    parts = [picture, {"type": "text", "text": "who is the baker ?"}]
    reply = client.chat.completions.create(
        model="decoder",
        messages=[*history, *user_message(parts)],
        max_tokens=6,
        temperature=0,
        user="me",
        frequency_penalty=0.5,
        extra_body={"regrad": {"passage_ids": [f"p{number}"]}},
    )
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == ("length" if expected.tokens == 6 else "stop")
    assert sorted(reply.model_extra["regrad"]["ignored"]) == [
        "frequency_penalty",
        "messages.0",
        "messages.1",
        "messages.2",
        "messages.3.content.0",
        "user",
    ]
    word = next(one for one in expected.text.split() if not expected.text.startswith(one))
    cut = client.chat.completions.create(
        model="decoder",
        messages=user_message("who is the baker ?"),
        max_tokens=6,
        stop=[word],
        extra_body={"regrad": {"passage_ids": [f"p{number}"]}},
    )
    assert cut.choices[0].message.content == expected.text[: expected.text.index(word)]


def test_seed_reproduces_a_sampled_answer(talking):
    _, client = talking
    asked: dict[str, Any] = {"model": "decoder", "messages": user_message("who is the baker ?"), "max_tokens": 6}

    def answer(**more):
        reply = client.chat.completions.create(**asked, **more)
        assert reply.model_extra["regrad"]["ignored"] == []
        return reply.choices[0].message.content, reply.model_extra["regrad"].get("seed")

    taken, seed = answer()
    assert seed is None
    drawn, seed = answer(temperature=3.0)
    assert answer(temperature=3.0, seed=seed) == (drawn, seed)
    named = {"regrad": {"temperature": 3.0, "seed": seed}}
    assert answer(extra_body=named, temperature=0) == (drawn, seed)
    assert len({answer(temperature=3.0, seed=number)[0] for number in range(8)}) > 1
    # top_p keeps the most likely token only
    assert answer(temperature=3.0, top_p=1e-6, seed=1)[0] == taken
    with pytest.raises(openai.UnprocessableEntityError, match="temperature: found -1"):
        answer(temperature=-1)


def test_stream_equals_the_single_response(talking):
    _, client = talking
    asked: dict[str, Any] = {
        "model": "decoder",
        "messages": user_message("who is the baker ?"),
        "max_completion_tokens": 5,
    }
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == (
        whole.choices[0].message.content
    )
    assert pieces[-1].usage == whole.usage
    assert [one.choices[0].finish_reason for one in pieces if one.choices][-1] == whole.choices[0].finish_reason


def test_invalid_chat_requests_are_rejected_with_a_reason(talking):
    _, client = talking
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="expected 'decoder'"):
        ask(model="gpt", messages=user_message("who ?"))
    with pytest.raises(openai.UnprocessableEntityError, match=r"regrad\.strength: found 'x'"):
        ask(model="decoder", messages=user_message("who ?"), extra_body={"regrad": {"strength": "x"}})
    with pytest.raises(openai.UnprocessableEntityError, match="ends with the role assistant"):
        ask(model="decoder", messages=[{"role": "assistant", "content": "a"}])
    with pytest.raises(openai.UnprocessableEntityError, match="n: found 2"):
        ask(model="decoder", messages=user_message("who ?"), n=2)
    with pytest.raises(openai.NotFoundError, match="'nowhere'"):
        ask(model="decoder", messages=user_message("who ?"), extra_body={"regrad": {"passage_ids": ["nowhere"]}})
    with pytest.raises(openai.AuthenticationError, match="token"):
        client.with_options(api_key="wrong").chat.completions.create(model="decoder", messages=user_message("who ?"))
    assert httpx.get(str(client.base_url).replace("/v1/", "/healthz")).status_code == 200
