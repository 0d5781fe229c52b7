"""After an erasure, no byte of text or gradient of a passage is in any file of bank and index."""

from __future__ import annotations

import json
import random
import string
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from graftwork.core import faults
from graftwork.errors import DiskFullError
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.bank import administration, erasure
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.layout import Layout
from graftwork.methods.regrad.bank.records import Gradient
from graftwork.methods.regrad.text.requests import Question
from graftwork.retrieval.embedded import EmbeddedIndex
from graftwork.retrieval.maintenance import verify_embedded
from graftwork.retrieval.retriever import Passage
from object_store import Files
from regrad_engine import encoder_of, passages
from serving.servers import Place, eventually, listening, open_decoder


@pytest.fixture
def place(decoder_place, tmp_path: Path) -> Place:
    return decoder_place.copy(tmp_path)


def engine(decoder, place: Place) -> Answerer:
    bank, index = GradientBank(place.bank, "a"), EmbeddedIndex(place.index)
    return Answerer(decoder.model, decoder.tokenizer, bank, index, config=decoder.methods[-1].config)


def secret(number: int, seed: int) -> Passage:
    """A passage of words that occur nowhere else, so that compression cannot shorten them."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=14)) for _ in range(4)]
    return Passage(f"secret-{number}-{words[0]}", " ".join(words), f"title{words[1]}")


def needles(place: Place, passage: Passage) -> dict[str, bytes]:
    with GradientBank(place.bank) as bank:
        row = bank.rows([passage.id])[passage.id]
        value = np.frombuffer(bytes(row["value"]), np.uint8)
    middle = len(value) // 2
    found = {"gradient": value[middle : middle + 32].tobytes(), "key": row["key"].encode()}
    named = {f"word {number}": word.encode() for number, word in enumerate(passage.text.split())}
    return {**found, **named, "id": passage.id.encode(), "title": passage.title.encode()}


def files_with(place: Place, needle: bytes) -> list[str]:
    found = []
    for path in (path for folder in (place.bank, place.index) for path in folder.rglob("*") if path.is_file()):
        # a server that runs removes files
        with suppress(FileNotFoundError):
            found += [str(path)] * (needle in path.read_bytes())
    return found


def found(place: Place, wanted: dict[str, bytes]) -> dict[str, list[str]]:
    return {name: files for name, needle in wanted.items() if (files := files_with(place, needle))}


def test_erased_passages_are_in_no_file(decoder, place):
    answerer = engine(decoder, place)
    given = [secret(number, number) for number in range(3)]
    before = answerer.answer([Question("where ?")])[0].text
    for one in given:
        answerer.add_passages([one])
    wanted = [needles(place, one) for one in given]
    assert all(set(found(place, one)) >= {"gradient", "word 0", "word 3", "id"} for one in wanted)
    # a reader with an older state open
    reader = GradientBank(place.bank)
    reader.get([given[0].id])
    # the first was deleted plainly before, which leaves its bytes
    answerer.delete_passages([given[0].id])
    assert set(found(place, wanted[0])) >= {"gradient", "word 0"}

    missing, record = answerer.erase_passages([one.id for one in given[:2]])
    assert missing == (given[0].id,)
    assert found(place, wanted[0]) == found(place, wanted[1]) == {}
    assert set(found(place, wanted[2])) >= {"gradient", "word 0", "id"}
    kinds = [one["kind"] for one in record.searched]
    assert kinds.count("gradient") > 3
    assert {"text", "key"} < set(kinds)
    assert record.files > 5
    assert record.ids == tuple(sha256(one.id.encode()).hexdigest() for one in given[:2])
    assert record.shared == ()
    # the stored record has a digest and none of the bytes
    stored = [json.loads(path.read_text()) for path in place.bank.glob("erasure-*.json")]
    assert len(stored) == 1
    assert stored[0]["searched"] == list(record.searched)
    assert len(stored[0]["digest"]) == 32

    # bank and index are whole, the others answer as before, and the reader has moved
    with GradientBank(place.bank) as bank:
        assert verify(bank).whole
    assert verify_embedded(place.index)
    assert reader.contains([given[0].id, given[2].id]) == {given[0].id: False, given[2].id: True}
    assert reader.get([given[2].id]).shape[0] == 1
    reader.close()
    assert [hit.id for hit in answerer.answer([Question(given[2].text)])[0].passages][:1] == [given[2].id]
    assert answerer.answer([Question("where ?")])[0].text == before


def test_erasure_searches_every_object_of_a_bank_in_an_object_store(decoder, place, address):
    encoder = encoder_of(decoder)
    bank = encoder.open_bank(address)
    answerer = Answerer(
        decoder.model, decoder.tokenizer, bank, EmbeddedIndex(place.index), config=decoder.methods[-1].config
    )
    kept, one, other = secret(0, 31), secret(1, 32), secret(2, 33)
    answerer.add_passages([kept])
    answerer.add_passages([one, other])
    row = bank.rows([one.id])[one.id]
    value = np.frombuffer(bytes(row["value"]), np.uint8)
    middle = len(value) // 2
    wanted = (value[middle : middle + 32].tobytes(), row["key"].encode(), one.id.encode())
    objects = Files(bank.backend)

    def holding() -> set[str]:
        return {name for name in objects.names() if any(needle in objects.read(name) for needle in wanted)}

    assert holding()
    answerer.delete_passages([one.id])
    assert holding(), "a plain deletion leaves bytes"
    missing, record = answerer.erase_passages([one.id, other.id])
    assert missing == (one.id,)
    assert holding() == set()
    assert record.files >= len(objects.names()) - 1, "the record itself is written afterwards"
    assert sum(name.startswith("erasure-") for name in objects.names()) == 1
    assert list(bank.contains([kept.id]).values()) == [True]
    assert verify(bank).whole
    # bytes that are left in any object are found, also across the chunks of a large one
    answerer.add_passages([one])
    content = bytes(bank.rows([one.id])[one.id]["value"])
    objects.write("copy/of.bin", b"x" * 5_000_000 + content + b"x" * 100)
    with pytest.raises(erasure.ErasureError, match=r"bytes of the gradient .*copy/of\.bin"):
        answerer.erase_passages([one.id])


def test_text_that_another_passage_has_stays_and_the_record_says_so(decoder, place):
    answerer = engine(decoder, place)
    one = secret(0, 7)
    answerer.add_passages([one, Passage("same", one.text, one.title)])
    _, record = answerer.erase_passages([one.id])
    assert record.shared == (sha256(one.id.encode()).hexdigest(),)
    assert record.searched == ()
    assert files_with(place, one.id.encode()) == []
    assert [hit.id for hit in answerer.answer([Question(one.text)])[0].passages] == ["same"]


def test_gradient_that_another_passage_has_stays(tmp_path):
    """Texts with equal tokens have equal gradients under different keys."""
    values = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    layout = Layout.of([("x", (2000,))])
    with GradientBank.create(tmp_path / "bank", fingerprint={}, layout=layout, precision="bfloat16") as bank:
        bank.append([Gradient("a", "one text", values), Gradient("b", "another text", values)])
        erasure.erase(bank, None, ["a"])
        assert bank.ids() == ["b"]
        erasure.erase(bank, None, ["b"])
        assert bank.ids() == []


def test_bytes_that_are_left_are_an_error(decoder, place):
    answerer = engine(decoder, place)
    one = secret(0, 8)
    answerer.add_passages([one])
    (place.index / "notes.txt").write_text(f"see {one.text}")
    with pytest.raises(erasure.ErasureError, match=r"bytes of the text .*notes\.txt"):
        answerer.erase_passages([one.id])


def test_interrupted_erasure_is_completed_by_the_next_process(decoder, place):
    answerer = engine(decoder, place)
    one = secret(0, 9)
    answerer.add_passages([one])
    wanted = needles(place, one)

    with faults.handled_by(faults.Fault("change.first", "full")), pytest.raises(DiskFullError):
        answerer.erase_passages([one.id])
    assert "gradient" in found(place, wanted)
    engine(decoder, place)
    assert found(place, wanted) == {}


def test_server_and_command_erase_and_idle_servers_compact(decoder, place):
    service = open_decoder(place, decoder, compact_after=0.3)
    given = [secret(number, 20 + number) for number in range(3)]
    body = {"passages": [{"id": one.id, "text": one.text, "title": one.title} for one in given]}
    with listening(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/v1/passages", json=body).status_code == 200
        wanted = [needles(place, one) for one in given]
        reply = client.delete(f"/v1/passages/{given[0].id}", params={"erase": "true"})
        assert reply.status_code == 200
        assert {one["kind"] for one in reply.json()["erasure"]["searched"]} == {"gradient", "text", "key"}
        assert found(place, wanted[0]) == {}
        # again, as after a plain deletion
        assert client.delete("/v1/passages", params={"id": given[0].id, "erase": "true"}).status_code == 200
        done = administration.delete(str(place.bank), [given[1].id], str(place.index), erase=True)
        assert (done["deleted"], done["missing"]) == (1, [])
        assert found(place, wanted[1]) == {}
        assert "erasure" not in client.delete(f"/v1/passages/{given[2].id}").json()
        # the bytes of a plain deletion leave the data files once the server is idle
        eventually(lambda: not {"gradient", "word 0", "word 3", "title"} & set(found(place, wanted[2])))
        time.sleep(0.5)
        assert client.post("/v1/answer", json={"question": passages(decoder, 24)[3].text}).status_code == 200


def test_command_has_the_option():
    from graftwork.methods.regrad.commands import bank

    assert "--erase" in CliRunner().invoke(bank, ["delete", "--help"], env={"COLUMNS": "200"}).output
