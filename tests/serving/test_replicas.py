"""Several servers and commands change one bank and one index; every server answers from the newest state of both."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations, count
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.bank import administration
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.text.requests import Question
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.retriever import Passage
from graftwork.serving.service import Service
from regrad_engine import encoder_of, passages, words
from serving.servers import GROWTH_MB, Place, listening, open_decoder, resident_mb

STRESS_SECONDS = float(os.environ.get("GRAFTWORK_SOAK_SECONDS", "60"))
TOKENS = 4
SECONDS = 1.0
"""Time after which a change is seen by every server."""


@pytest.fixture
def place(decoder_place, tmp_path: Path) -> Place:
    return decoder_place.copy(tmp_path)


@contextmanager
def clients(*services: Service) -> Iterator[list[httpx.Client]]:
    """Clients of servers that run while the context is open."""
    with ExitStack() as opened:
        addresses = [opened.enter_context(listening(one)) for one in services]
        yield [opened.enter_context(httpx.Client(base_url=address, timeout=60)) for address in addresses]


def post(client: httpx.Client, path: str, **body) -> httpx.Response:
    return client.post(path, json=body)


def ids(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [one["id"] for one in reply.json()["passages"]]


def alone(decoder, place: Place, question: str) -> tuple[str, tuple[str, ...]]:
    """Answer and passages, from bank and index as they are."""
    with GradientBank(place.bank) as bank:
        config = decoder.methods[-1].config
        engine = Answerer(decoder.model, decoder.tokenizer, bank, EmbeddedIndex(place.index), config=config)
        answer = engine.answer([Question(question)], max_new_tokens=4)[0]
    return answer.text, tuple(hit.id for hit in answer.passages)


def test_changes_of_one_server_or_command_are_seen_by_the_other(decoder, place):
    known = passages(decoder, 24)
    question = " ".join(known[3].text.split()[:4])
    fresh = " ".join(words(decoder)[-5:])
    with clients(open_decoder(place, decoder), open_decoder(place, decoder)) as (first, second):
        asked = {"question": question, "top_k": 3, "max_new_tokens": 4}
        before = [post(client, "/v1/answer", **asked).json() for client in (first, second)]
        assert before[0]["answer"] == before[1]["answer"]
        top = before[0]["passages"][0]["id"]

        assert first.delete(f"/v1/passages/{top}").status_code == 200
        started = time.monotonic()
        reply = post(second, "/v1/answer", **asked)
        assert top not in ids(reply)
        assert (reply.json()["answer"], tuple(ids(reply))) == alone(decoder, place, question)
        assert second.delete(f"/v1/passages/{top}").status_code == 404

        assert post(second, "/v1/passages", passages=[{"id": "fresh", "text": fresh}]).status_code == 200
        assert ids(post(first, "/v1/answer", question=fresh, top_k=1)) == ["fresh"]
        assert time.monotonic() - started < 20 * SECONDS, "the bound for a loaded machine"
        # a server whose index was changed by another adds and replaces passages as well
        changed = {"id": "fresh", "text": f"{fresh} {words(decoder)[0]}"}
        assert post(first, "/v1/passages", passages=[changed]).status_code == 409
        assert post(first, "/v1/passages", passages=[changed], replace=True).status_code == 200
        assert ids(post(second, "/v1/answer", question=fresh, top_k=1)) == ["fresh"]

        assert administration.delete(str(place.bank), ["fresh"], str(place.index)) == {"deleted": 1, "missing": []}
        for client in (first, second):
            assert "fresh" not in ids(post(client, "/v1/answer", question=fresh))
        assert post(first, "/v1/answer", question=fresh, passage_ids=["fresh"]).status_code == 404


def test_every_answer_equals_one_alone_while_others_change_bank_and_index(decoder, place):
    """Passages appear and disappear between two states; each answer is that of one of them."""
    text = " ".join(words(decoder)[-6:])
    question, extra = text, Passage("extra", text)
    states = {alone(decoder, place, question)}
    with clients(open_decoder(place, decoder), open_decoder(place, decoder)) as (asked, changed):
        add = {"passages": [{"id": extra.id, "text": extra.text}]}
        assert post(changed, "/v1/passages", **add).status_code == 200
        states.add(alone(decoder, place, question))
        assert len(states) == 2
        stop, failures = threading.Event(), []

        def change() -> None:
            while not stop.is_set():
                if changed.delete("/v1/passages/extra").status_code >= 500:
                    failures.append("delete")
                if post(changed, "/v1/passages", **add).status_code >= 500:
                    failures.append("add")
                administration.compact(str(place.bank))

        worker = threading.Thread(target=change)
        worker.start()
        seen = set()
        try:
            for _ in range(25):
                reply = post(asked, "/v1/answer", question=question, max_new_tokens=4)
                seen.add((reply.json()["answer"], tuple(ids(reply))))
                assert reply.json()["missing"] == []
        finally:
            stop.set()
            worker.join()
        assert failures == []
        assert seen <= states


def test_bank_that_is_a_working_set_of_a_larger_index(decoder, place):
    known = passages(decoder, 24)
    with GradientBank(place.bank, "a") as bank:
        bank.delete([one.id for one in known[::2]])
    with clients(open_decoder(place, decoder)) as (client,):
        missing = 0
        for passage in known[:8]:
            question = " ".join(passage.text.split()[:4])
            reply = post(client, "/v1/answer", question=question, top_k=3, blind=False, max_new_tokens=2)
            found = EmbeddedIndex(place.index).search([question], 3)[0]
            held = [hit.id for hit in found if int(hit.id[1:]) % 2]
            assert ids(reply) == held
            assert [one["rank"] for one in reply.json()["passages"]] == list(range(len(held)))
            assert reply.json()["missing"] == [hit.id for hit in found if hit.id not in held]
            missing += len(reply.json()["missing"])
        assert missing


def test_index_and_bank_replaced_or_damaged_under_a_server(decoder, place, tmp_path: Path):
    question = " ".join(passages(decoder, 24)[3].text.split()[:4])
    with clients(open_decoder(place, decoder)) as (client,):
        assert "p3" in ids(post(client, "/v1/answer", question=question))
        # the index is built again, of fewer passages
        rows = [f"{one.id}\t{one.text}\t{one.title}\n" for one in passages(decoder, 24) if one.id != "p3"]
        (tmp_path / "fewer.tsv").write_text("id\ttext\ttitle\n" + "".join(rows))
        build_embedded(tmp_path / "fewer.tsv", place.index, overwrite=True)
        assert "p3" not in ids(post(client, "/v1/answer", question=question))
        for file in (place.index / "index.json", place.bank / "seal.json"):
            content = file.read_bytes()
            for damaged in (b"", content.replace(b'"digest": "', b'"digest": "0'), b"{}"):
                file.write_bytes(damaged)
                # the second question is not answered from an older state either
                for _ in range(2):
                    reply = post(client, "/v1/answer", question=question)
                    assert reply.status_code == 503, (file, damaged, reply.text)
            file.write_bytes(content)
            assert post(client, "/v1/answer", question=question).status_code == 200
        # a bank of other gradients in the same place
        shutil.move(place.bank, tmp_path / "moved")
        reply = post(client, "/v1/answer", question=question)
        assert reply.status_code == 503, reply.text
        other = encoder_of(decoder).open_bank(place.bank, precision="float32")
        other.append(encoder_of(decoder).encode(passages(decoder, 24)[:2]))
        reply = post(client, "/v1/answer", question=question)
        assert (reply.status_code, "replaced" in reply.text) == (503, True)


def streamed(client: httpx.Client, question: str) -> tuple[int, dict[str, Any]]:
    """Ask by OpenAI's chat API as a stream; return the status, and text and record of the answer, or the error."""
    body = {
        "model": "decoder",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": TOKENS,
        "stream": True,
    }
    text, record = "", {}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            return reply.status_code, {"error": reply.read().decode()}
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return int(chunk["error"]["code"]), chunk
            text += chunk["choices"][0]["delta"].get("content", "")
            record = chunk.get("regrad", record)
    return 200, {"answer": text, **record}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_answers_stay_those_of_a_state_while_two_servers_and_a_command_add_delete_and_erase(decoder, place):
    """32 clients stream answers while three passages come and go; no request fails on the server's side."""
    vocabulary = words(decoder)
    extras = [Passage(f"extra{number}", " ".join(vocabulary[7 * number : 7 * number + 6])) for number in range(3)]
    question = " ".join(word for one in extras for word in one.text.split()[:3])
    expected: dict[tuple[str, ...], str] = {}
    for present in (subset for size in range(4) for subset in combinations(extras, size)):
        copied = place.copy(place.bank.parent / "-".join(["state", *(one.id for one in present)]))
        with GradientBank(copied.bank, "a") as bank:
            config = decoder.methods[-1].config
            index = EmbeddedIndex(copied.index)
            engine = Answerer(decoder.model, decoder.tokenizer, bank, index, config=config)
            engine.add_passages(present)
            answer = engine.answer([Question(question)], max_new_tokens=TOKENS)[0]
        expected[tuple(sorted(hit.id for hit in answer.passages))] = answer.text
    assert len(set(expected.values())) > 2
    stop, failures, seen = threading.Event(), [], Counter()
    changes = Counter()

    def ask(client: httpx.Client) -> None:
        while not stop.is_set():
            status, found = streamed(client, question)
            if status != 200 or found["missing"]:
                failures.append(found)
                return
            names = tuple(sorted(one["id"] for one in found["passages"]))
            seen[names] += 1
            if expected.get(names) != found["answer"]:
                failures.append(f"{names} {found['answer']!r} instead of {expected.get(names)!r}")

    def change(client: httpx.Client, one: Passage) -> None:
        for number in count():
            if stop.is_set():
                return
            body = {"passages": [{"id": one.id, "text": one.text}]}
            replies = [post(client, "/v1/passages", **body)]
            if number % 3 == 2:
                administration.delete(str(place.bank), [one.id], str(place.index), erase=True)
                changes["command"] += 1
            else:
                erase = "true" if number % 3 else "false"
                replies.append(client.delete(f"/v1/passages/{one.id}", params={"erase": erase}))
            changes.update(str(reply.status_code) for reply in replies)
            failures.extend(reply.text for reply in replies if reply.status_code >= 500)

    sizes: list[float] = []
    services = [open_decoder(place, decoder, compact_after=0.2) for _ in range(2)]
    with clients(*services) as opened, ExitStack() as more:
        askers = [more.enter_context(httpx.Client(base_url=opened[n % 2].base_url, timeout=120)) for n in range(32)]
        changers = [more.enter_context(httpx.Client(base_url=opened[n % 2].base_url, timeout=120)) for n in range(3)]
        threads = [threading.Thread(target=ask, args=(client,)) for client in askers]
        threads += [
            threading.Thread(target=change, args=(client, one)) for client, one in zip(changers, extras, strict=True)
        ]
        for one in threads:
            one.start()
        for _ in range(4):
            time.sleep(STRESS_SECONDS / 4)
            sizes.append(resident_mb())
        stop.set()
        for one in threads:
            one.join()
    print(f"{sum(seen.values())} answers, {len(seen)} of {len(expected)} sets of passages, changes {dict(changes)}")
    print("; ".join(f"{size:.0f} MB" for size in sizes))
    assert failures == []
    assert len(seen) > 2
    assert sizes[-1] - sizes[1] < GROWTH_MB
