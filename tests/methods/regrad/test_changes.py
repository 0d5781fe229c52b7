"""Changes of a bank together with its index."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from graftwork.core import faults
from graftwork.errors import DiskFullError
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.bank import changes
from graftwork.methods.regrad.bank.errors import DuplicatePassageError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import encode_passages
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.retriever import Passage
from regrad_engine import adapted_decoder, encoder_of, passages, words


@pytest.fixture(scope="module")
def converted():
    return adapted_decoder()


@pytest.fixture
def place(converted, tmp_path: Path) -> Path:
    """Folder with a bank and an index of the same two passages."""
    known = passages(converted, 2)
    encoder = encoder_of(converted)
    encode_passages(encoder, encoder.open_bank(tmp_path / "bank"), known)
    lines = [f"{one.id}\t{one.text}\t{one.title}\n" for one in known]
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(lines))
    build_embedded(tmp_path / "corpus.tsv", tmp_path / "index")
    return tmp_path


def texts(place: Path) -> dict[str, str]:
    return {one.id: one.text for one in EmbeddedIndex(place / "index").all_passages()}


def new_text(converted) -> str:
    return " ".join(words(converted)[:6])


def answerer(converted, place: Path, mode: str = "a") -> Answerer:
    bank, index = GradientBank(place / "bank", mode), EmbeddedIndex(place / "index")
    return Answerer(converted.model, converted.tokenizer, bank, index, config=converted.methods[-1].config)


def test_a_passage_that_cannot_be_encoded_is_in_neither(converted, place):
    encoder, index = encoder_of(converted), EmbeddedIndex(place / "index")
    given = [Passage("long", new_text(converted)), Passage("short", "\u200b", "")]
    done = encode_passages(encoder, encoder.open_bank(place / "bank"), given, index=index)
    with GradientBank(place / "bank") as bank:
        assert done.rejected == ("short" not in bank.ids())
        assert bank.ids() == sorted(texts(place))
    assert "long" in texts(place)


@pytest.mark.parametrize("mode", ["a", "r"])
def test_an_interrupted_replacement_is_completed_when_both_are_opened(converted, place, mode):
    before = texts(place)
    with faults.handled_by(faults.Fault("change.first", "full")), pytest.raises(DiskFullError):
        answerer(converted, place).add_passages([Passage("p0", new_text(converted))], replace=True)
    assert texts(place) == before
    answerer(converted, place, mode)
    assert texts(place) == {**before, "p0": new_text(converted)}
    assert not (place / "index" / changes.CHANGE_FILE).exists()


def test_an_interrupted_deletion_is_completed_by_the_next_change(converted, place):
    with faults.handled_by(faults.Fault("change.first", "full")), pytest.raises(DiskFullError):
        answerer(converted, place).delete_passages(["p0"])
    with GradientBank(place / "bank") as bank:
        assert bank.ids() == ["p0", "p1"]
    answerer(converted, place).add_passages([Passage("p2", new_text(converted))])
    with GradientBank(place / "bank") as bank:
        assert bank.ids() == sorted(texts(place)) == ["p1", "p2"]


def test_a_change_that_is_refused_leaves_no_record(converted, place):
    with pytest.raises(DuplicatePassageError, match="another text for passage 'p0'"):
        answerer(converted, place).add_passages([Passage("p0", new_text(converted))])
    assert not (place / "index" / changes.CHANGE_FILE).exists()


def test_a_change_that_cannot_be_completed_is_named_by_a_warning(converted, place, caplog):
    with faults.handled_by(faults.Fault("change.first", "full")), pytest.raises(DiskFullError):
        answerer(converted, place).add_passages([Passage("p2", new_text(converted))])
    with faults.handled_by(faults.Fault("index.pending", "read-only")), caplog.at_level(logging.WARNING):
        answerer(converted, place)
    assert f"{place / 'index'} contains an unfinished change" in caplog.text
    assert "p2" not in texts(place)
