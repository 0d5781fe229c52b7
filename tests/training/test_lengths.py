"""Numbers of tokens of examples equal those of their encodings, and are computed once for a cached table."""

from __future__ import annotations

import pytest

from graftwork.core import stored_rows
from graftwork.core.example import Example
from graftwork.core.stored_rows import store_rows
from graftwork.training.encoding import EncodedExamples, LabelledExamples
from tiny_models import word_tokenizer


def test_lengths_for_packing_are_those_of_the_truncated_encodings():
    rows = [
        Example("0", "w5 w6 w7 w8", "w7 w8 w9"),
        Example("1", "w5", "w6"),
        Example("2", "w5", "w6 w7 w8 w9", pair="w6"),
    ]
    data = EncodedExamples(rows, word_tokenizer(), encoder_decoder=True, max_input_tokens=3, max_target_tokens=3)
    assert data.lengths().tolist() == [[len(row["input_ids"]), len(row["labels"])] for row in data]
    assert data.lengths().tolist() == [[3, 3], [1, 2], [2, 3]]
    assert data.input_lengths().tolist() == [3, 1, 2]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_lengths_of_decoder_rows_are_those_of_their_encodings(bos):
    rows = [Example("0", "w5 w6 w7 w8", "w7 w8 w9"), Example("1", "w5", "w6", pair="w7")]
    tokenizer = word_tokenizer()
    tokenizer.bos_token = bos
    data = EncodedExamples(rows, tokenizer, encoder_decoder=False, max_input_tokens=3, max_target_tokens=3)
    assert data.input_lengths().tolist() == [len(row["input_ids"]) for row in data]


def test_lengths_of_text_pairs_are_those_of_their_encodings():
    rows = [Example("0", "w5 w6", "a", pair="w7"), Example("1", "w5 w6 w7 w8", "b"), Example("2", "w5", "a", pair="w6")]
    for chosen in (rows, rows[1:2]):
        data = LabelledExamples(chosen, word_tokenizer(), label2id={"a": 0, "b": 1}, max_input_tokens=3)
        assert data.input_lengths().tolist() == [len(data[n]["input_ids"]) for n in range(len(chosen))]


def test_lengths_of_a_cached_table_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(stored_rows, "IN_MEMORY", 2)
    rows = [Example(str(n), "w5 " * (n % 4 + 1), "w6") for n in range(9)]
    table = store_rows(lambda: iter(rows), "k")
    options = {"encoder_decoder": True, "max_target_tokens": 3}
    data = EncodedExamples(table, word_tokenizer(), max_input_tokens=3, **options)
    expected = EncodedExamples(rows, word_tokenizer(), max_input_tokens=3, **options).lengths().tolist()
    assert data.lengths().tolist() == expected
    monkeypatch.setattr(EncodedExamples, "_counts", lambda self, rows: pytest.fail("tokenised again"))
    assert data.lengths().tolist() == expected
    # another limit or another tokenizer has other lengths
    monkeypatch.undo()
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    assert EncodedExamples(table, word_tokenizer(), max_input_tokens=2, **options).lengths().tolist() != expected
    assert len(list((tmp_path / "lengths").iterdir())) == 2
