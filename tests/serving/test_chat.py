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
        assert client.models.retrieve("run").owned_by == "graftwork"
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


def test_system_prompt_and_earlier_turns_are_part_of_the_prompt(talking):
    service, client = talking
    history = (("user", "who ?"), ("assistant", "nobody"))
    asked = [
        Question("who is the baker ?", (f"p{number}",), system="be short", history=history) for number in range(24)
    ]
    plain = [Question("who is the baker ?", (f"p{number}",)) for number in range(24)]
    answers, others = (service.answerer.answer(one, max_new_tokens=6) for one in (asked, plain))
    number = next(n for n in range(24) if answers[n].text != others[n].text and len(set(answers[n].text.split())) > 1)
    expected = answers[number]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    parts = [picture, {"type": "text", "text": "who is the baker ?"}]
    messages: Any = [
        {"role": "developer", "content": "be short"},
        *user_message("who ?"),
        {"role": "assistant", "content": "nobody"},
        {"role": "tool", "content": "12", "tool_call_id": "a"},
        *user_message(parts),
    ]
    named: Any = {"regrad": {"passage_ids": [f"p{number}"]}}
    more: Any = {"temperature": 0, "user": "me", "frequency_penalty": 0.5}
    ask = client.chat.completions.create
    reply = ask(model="decoder", messages=messages, max_tokens=6, extra_body=named, **more)
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == ("length" if expected.tokens == 6 else "stop")
    assert sorted(reply.model_extra["regrad"]["ignored"]) == [
        "frequency_penalty",
        "messages.3",
        "messages.4.content.0",
        "user",
    ]
    word = next(one for one in expected.text.split() if not expected.text.startswith(one))
    for stream in (False, True):
        cut = ask(model="decoder", messages=messages, max_tokens=6, stop=[word], extra_body=named, stream=stream)
        chunks = list(cut) if stream else []
        text = "".join(one.choices[0].delta.content or "" for one in chunks) or cut.choices[0].message.content
        assert text == expected.text[: expected.text.index(word)]
        last = chunks[-1] if stream else cut
        assert last.choices[0].finish_reason == "stop"
        assert last.model_extra["regrad"]["tokens"] < expected.tokens or expected.text.endswith(word)


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
    service, client = talking
    questions = [Question("who is the baker ?", (f"p{number}",)) for number in range(24)]
    answers = service.answerer.answer(questions, max_new_tokens=9)
    number = max(range(24), key=lambda one: len(answers[one].text.split()))
    asked: dict[str, Any] = {
        "model": "decoder",
        "messages": user_message("who is the baker ?"),
        "max_completion_tokens": 9,
        "extra_body": {"regrad": {"passage_ids": [f"p{number}"]}},
    }
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    parts = [one.choices[0].delta.content for one in pieces if one.choices and one.choices[0].delta.content]
    assert "".join(parts) == whole.choices[0].message.content == answers[number].text
    assert len(parts) > 4
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].usage == whole.usage
    assert all(one.usage is None for one in pieces[:-1])
    last = pieces[-2]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    about = last.model_extra["regrad"]
    assert about["passages"] == whole.model_extra["regrad"]["passages"]
    assert 0 < about["seconds"]["first_token"] < about["seconds"]["wait"] + about["seconds"]["generate"]


def test_several_answers_to_one_request(talking):
    _, client = talking
    asked: dict[str, Any] = {"model": "decoder", "messages": user_message("who is the baker ?"), "max_tokens": 6}
    same = client.chat.completions.create(**asked, n=3)
    assert len({one.message.content for one in same.choices}) == 1
    drawn = client.chat.completions.create(**asked, n=3, temperature=3.0, seed=5)
    seeds = drawn.model_extra["regrad"]["seeds"]
    assert [one.index for one in drawn.choices] == [0, 1, 2]
    assert (len(set(seeds)), seeds[0]) == (3, 5)
    alone = [client.chat.completions.create(**asked, temperature=3.0, seed=one) for one in seeds]
    assert [one.message.content for one in drawn.choices] == [one.choices[0].message.content for one in alone]
    assert len({one.message.content for one in drawn.choices}) > 1
    assert drawn.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert drawn.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, temperature=3.0, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [one.message.content for one in drawn.choices]


def test_logprobs_are_those_of_the_updated_model(talking):
    service, client = talking
    asked: dict[str, Any] = {
        "model": "decoder",
        "messages": user_message("who is the baker ?"),
        "max_tokens": 5,
        "extra_body": {"regrad": {"passage_ids": ["p3"]}},
    }
    update = service.answerer.gradient_retriever.retrieve([Question("who is the baker ?", ("p3",))])[0]
    tokens = service.answerer.generate([update], max_new_tokens=5)[0].generated
    expected = service.answerer.log_probabilities([update], tokens)[0]
    # sampling does not change what is reported
    for temperature in (0, 0.001):
        reply = client.chat.completions.create(
            **asked, logprobs=True, top_logprobs=2, temperature=temperature, seed=1
        ).choices[0]
        found = reply.logprobs.content[: len(tokens)]
        assert sum(one.logprob for one in found) == pytest.approx(expected, abs=1e-3)
        assert "".join(one.token for one in found).strip() == reply.message.content
        for one in found:
            assert [len(one.top_logprobs), one.top_logprobs[0].token] == [2, one.token]
            assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
            assert bytes(one.bytes).decode() == one.token
    streamed = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
    entries = [entry for one in streamed if one.choices[0].logprobs for entry in one.choices[0].logprobs.content]
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert entries == whole


def test_completions_continue_a_prompt(talking):
    service, client = talking
    prompts = ["the baker is", "who lives here ?"]
    questions = [Question(text, ("p3",), verbatim=True) for text in prompts]
    expected = [service.answerer.answer([one], max_new_tokens=7)[0] for one in questions]
    assert len({one.text for one in expected}) == 2
    asked: dict[str, Any] = {"model": "decoder", "max_tokens": 7, "extra_body": {"regrad": {"passage_ids": ["p3"]}}}
    reply = client.completions.create(prompt=prompts, n=2, logprobs=1, **asked)
    assert [one.text for one in reply.choices] == [expected[number // 2].text for number in range(4)]
    lengths = [service.answerer.prompts.build(one, (), 7) for one in questions]
    assert reply.usage.prompt_tokens == sum(map(len, lengths))
    about = reply.choices[0].logprobs
    assert "".join(about.tokens).strip() == expected[0].text.strip()
    assert about.text_offset == [len("".join(about.tokens[:number])) for number in range(len(about.tokens))]
    assert [max(one.values()) for one in about.top_logprobs] == about.token_logprobs
    chunks = list(client.completions.create(prompt=prompts[0], stream=True, **asked))
    assert "".join(one.choices[0].text for one in chunks) == expected[0].text
    assert chunks[-1].choices[0].finish_reason == ("length" if expected[0].tokens == 7 else "stop")


def test_a_long_answer_does_not_hold_up_short_ones(talking):
    service, client = talking
    asked = [Question("who is the baker ?", (f"p{number}",), verbatim=True) for number in range(8)]
    limit = 120
    answers = service.answerer.answer(asked, max_new_tokens=limit)
    long = next(number for number in range(8) if answers[number].tokens == limit)
    named: Any = {"regrad": {"passage_ids": [f"p{long}"]}}
    stream = client.completions.create(
        model="decoder", prompt="who is the baker ?", max_tokens=limit, stream=True, extra_body=named
    )
    parts = [next(iter(stream)).choices[0].text]
    for _ in range(5):
        client.chat.completions.create(model="decoder", messages=user_message("who ?"), max_tokens=2)
    assert service.queue._active, "the long answer is in progress"
    parts += [one.choices[0].text for one in stream]
    assert "".join(parts) == answers[long].text


def test_errors_in_a_stream_are_raised_by_the_client(talking, monkeypatch):
    service, client = talking
    asked: dict[str, Any] = {"model": "decoder", "messages": user_message("who is the baker ?"), "max_tokens": 9}

    def fail() -> None:
        raise MemoryError("a fault of the test")

    with pytest.raises(openai.NotFoundError, match="nowhere"):
        client.chat.completions.create(**asked, stream=True, extra_body={"regrad": {"passage_ids": ["nowhere"]}})
    with monkeypatch.context() as patched:
        # a failed batch is computed again row by row, which fails as well
        patched.setattr(service.queue._decoder, "step", fail)
        patched.setattr(service.queue, "_restarted", lambda requests: fail())
        with pytest.raises(openai.APIError, match="see its log"):
            list(client.chat.completions.create(**asked, stream=True))
    assert client.chat.completions.create(**asked).choices[0].message.content


def test_invalid_chat_requests_are_rejected_with_a_reason(talking):
    _, client = talking
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="expected 'decoder'"):
        ask(model="gpt", messages=user_message("who ?"))
    with pytest.raises(openai.UnprocessableEntityError, match=r"regrad\.strength: found 'x'"):
        ask(model="decoder", messages=user_message("who ?"), extra_body={"regrad": {"strength": "x"}})
    with pytest.raises(openai.UnprocessableEntityError, match="ends with the role assistant"):
        ask(model="decoder", messages=[{"role": "assistant", "content": "a"}])
    with pytest.raises(openai.UnprocessableEntityError, match="n: found 0"):
        ask(model="decoder", messages=user_message("who ?"), n=0)
    with pytest.raises(openai.NotFoundError, match="'nowhere'"):
        ask(model="decoder", messages=user_message("who ?"), extra_body={"regrad": {"passage_ids": ["nowhere"]}})
    with pytest.raises(openai.AuthenticationError, match="token"):
        client.with_options(api_key="wrong").chat.completions.create(model="decoder", messages=user_message("who ?"))
    assert httpx.get(str(client.base_url).replace("/v1/", "/healthz")).status_code == 200
