"""Encoding of passages: batch invariance, resuming, and sharding."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import regrad_engine
from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.errors import DuplicatePassageError
from graftwork.methods.regrad.bank.files import CommitRecord
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.opening import backend_for
from graftwork.methods.regrad.bank.transfer import merge, record_digests
from graftwork.methods.regrad.encoding.encoder import belongs_to, count_missing, encode_passages
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.retrieval.retriever import Passage
from regrad_engine import adapted_decoder, encoder_of, passages, trainer_of

PROGRAM = regrad_engine.__file__


@pytest.fixture(scope="module")
def converted():
    return adapted_decoder()


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_gradients_are_independent_of_batching(converted):
    some = passages(converted, 32, longest=400)
    alone = {one.id: one.values for one in encoder_of(converted, batch_size=1).encode(some)}
    shuffled = random.Random(3).sample(some, len(some))
    for size, order in ((16, some), (5, shuffled)):
        found = encoder_of(converted, batch_size=size, tokens_per_batch=10**6).encode(order)
        assert [one.id for one in found] == [one.id for one in order]
        assert max(relative(one.values, alone[one.id]) for one in found) <= 1e-5


def test_batches_respect_limits_and_are_sorted_by_length(converted):
    encoder = encoder_of(converted, batch_size=8, tokens_per_batch=120)
    documents = [encoder.document(one) for one in passages(converted, 40, longest=90)]
    batches = encoder.batches(documents)
    assert sorted(one.id for batch in batches for one in batch) == sorted(one.id for one in documents)
    for batch in batches:
        assert len(batch) <= 8
        assert len(batch) == 1 or len(batch) * max(len(one.ids) for one in batch) <= 120
    widths = [len(one.ids) for batch in batches for one in batch]
    assert widths == sorted(widths, reverse=True)


def test_gradients_are_independent_of_padding(converted):
    encoder = encoder_of(converted)
    documents = [encoder.document(one) for one in passages(converted, 3)]
    width = max(len(one.ids) for one in documents)
    values = []
    for extra in (0, 100):
        ids = torch.full((3, width + extra), 2)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(documents):
            ids[row, : len(one.ids)], mask[row, : len(one.ids)] = torch.tensor(one.ids), 1
        values.append(passage_gradients(converted.model, ids, mask)[0].numpy())
    assert relative(values[1], values[0]) <= 1e-6


def test_truncated_passage_equals_shortened_text(converted):
    text = passages(converted, 1, shortest=30)[0].text
    short = adapted_decoder(max_document_tokens=11)
    cut, whole = encoder_of(short).encode([Passage("a", text)])[0], encoder_of(short)
    by_hand = encoder_of(converted).encode([Passage("b", " ".join(text.split()[:10]))])[0]
    assert cut.truncated
    assert not by_hand.truncated
    assert cut.tokens == by_hand.tokens == 11
    assert relative(cut.values, by_hand.values) <= 1e-6
    assert whole.document(Passage("c", "the man")).truncated is False


def test_empty_passages_are_rejected_and_counted(converted, tmp_path: Path):
    encoder = encoder_of(converted)
    with pytest.raises(DataError, match=r"passage 'empty'.*expected at least 2"):
        encoder.encode([Passage("empty", " ")])
    bank = encoder.open_bank(tmp_path / "bank")
    done = encode_passages(encoder, bank, [*passages(converted, 2), Passage("empty", " ")])
    assert (done.written, done.rejected) == (2, 1)
    assert "passage 'empty'" in done.reasons[0]


def test_equal_texts_are_computed_once_and_existing_ones_never(converted, tmp_path: Path, monkeypatch):
    encoder = encoder_of(converted)
    bank = encoder.open_bank(tmp_path / "bank", precision="float32")
    some = passages(converted, 3)
    twins = [Passage(f"twin of {one.id}", one.text, one.title) for one in some]
    computed = []
    own = type(encoder).gradients
    monkeypatch.setattr(type(encoder), "gradients", lambda self, batch: computed.extend(batch) or own(self, batch))
    first = encode_passages(encoder, bank, [*some, twins[0]])
    assert (first.written, first.aliased, len(computed)) == (3, 1, 3)
    second = encode_passages(encoder, bank, [*some, *twins])
    assert (second.written, second.aliased, second.skipped, len(computed)) == (0, 2, 4, 3)
    assert torch.equal(bank.get(["twin of p1"]), bank.get(["p1"]))
    assert count_missing(encoder, bank, [*some, *twins, Passage("new", "text")]) == 1


def test_id_with_another_text_is_rejected_or_replaced(converted, tmp_path: Path):
    encoder = encoder_of(converted)
    bank = encoder.open_bank(tmp_path / "bank")
    encode_passages(encoder, bank, passages(converted, 2))
    other = [Passage("p0", "the baker was born in april")]
    with pytest.raises(DuplicatePassageError, match="another text for 'p0'"):
        encode_passages(encoder, bank, other)
    assert encode_passages(encoder, bank, other, replace=True).replaced == 1
    assert len(bank) == 2
    with pytest.raises(ConfigError, match="of precision bfloat16"):
        encoder.open_bank(tmp_path / "bank", precision="int8")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gradients", "adapters"])
def test_killed_encoder_reproduces_the_uninterrupted_bank(converted, tmp_path: Path, kind):
    count, window = 96, 4
    adapters = kind == "adapters"
    command = [
        sys.executable,
        PROGRAM,
        str(tmp_path / "bank"),
        str(count),
        str(window),
        *(["train"] if adapters else []),
    ]
    draw = random.Random(0)
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            wanted = CommitRecord.read(backend_for(tmp_path / "bank")).ids + window * draw.randint(1, 5)
            while CommitRecord.read(backend_for(tmp_path / "bank")).ids < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            assert process.stdout.read() == "", "the encoder ended before it could be killed"
        with GradientBank(tmp_path / "bank") as reader:
            assert verify(reader).whole
    encoder = (trainer_of if adapters else encoder_of)(converted, batch_size=4)
    some = passages(converted, count)
    bank = encoder.open_bank(tmp_path / "bank")
    before = len(bank)
    assert 0 < before < count
    # two concurrent encoders finish without losses or duplicates
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["ready\ndone\n"] * 2
    assert verify(bank).whole
    assert bank.stats()["records"] == bank.stats()["ids"] == count
    assert encode_passages(encoder, bank, some, window=window).skipped == count
    whole = encoder.open_bank(tmp_path / "whole")
    encode_passages(encoder, whole, some, window=window)
    assert dict(record_digests(bank)) == dict(record_digests(whole))


@pytest.mark.parametrize("workers", [2, 4])
def test_merged_shards_equal_the_bank_of_one_worker(converted, tmp_path: Path, workers):
    encoder, some = encoder_of(converted), passages(converted, 48)
    whole = encoder.open_bank(tmp_path / "whole", precision="float32")
    encode_passages(encoder, whole, some)
    shards = []
    for worker in range(workers):
        shard = encoder.open_bank(tmp_path / str(worker), precision="float32")
        encode_passages(encoder, shard, [one for one in some if belongs_to(one.id, worker, workers)])
        assert 0 < len(shard) < len(some)
        shards.append(shard)
    together = encoder.open_bank(tmp_path / "together", precision="float32")
    merge(together, shards)
    assert together.ids() == whole.ids()
    ids = whole.ids()
    assert relative(together.get(ids).numpy(), whole.get(ids).numpy()) <= 1e-6


def test_near_duplicates_share_one_gradient(converted, tmp_path):
    """White space at line ends, runs of it, and the Unicode form do not make another text; line breaks do."""
    encoder = encoder_of(converted)
    text = "the caf\u00e9 is  open\nand warm"
    same = [text, f" {text} \n", "the cafe\u0301 is open \r\nand warm", "the caf\u00e9 is \t open\nand  warm"]
    other = [text.replace("\n", " "), text.replace("warm", "cold"), text.replace("\n", "\n  ")]
    given = [Passage(f"p{number}", one) for number, one in enumerate([*same, *other])]
    bank = encoder.open_bank(tmp_path / "bank", precision="float32")
    done = encode_passages(encoder, bank, given)
    assert (done.written, done.aliased) == (4, 3)
    assert len({bank.keys([one.id])[one.id] for one in given[:4]}) == 1
    # the gradient does not depend on which of them comes first
    assert bank.get(["p1"]).numpy().tobytes() == encoder.encode(given[:1])[0].values.tobytes()


def test_a_passage_is_encoded_while_another_thread_answers():
    converted = adapted_decoder()
    ids = torch.arange(5, 25)[None]
    expected = converted.model(input_ids=ids).logits
    encoder = encoder_of(converted)
    some = [encoder.document(one) for one in passages(converted, 4)]
    stop = threading.Event()

    def encode():
        while not stop.is_set():
            encoder.gradients(some)

    worker = threading.Thread(target=encode)
    worker.start()
    try:
        with torch.no_grad():
            found = [converted.model(input_ids=ids).logits for _ in range(60)]
    finally:
        stop.set()
        worker.join()
    assert all(torch.equal(one, expected) for one in found)
