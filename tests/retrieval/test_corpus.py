"""Quoted cells of tables are read as Python's csv module reads them."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest

from graftwork.retrieval import compact_ids
from graftwork.retrieval.corpus import CorpusReader, find_corpus


def read(path: Path) -> tuple[dict[str, tuple[str, str]], CorpusReader]:
    reader = CorpusReader(find_corpus(path))
    return {one.id: (one.text, one.title) for one in reader}, reader


def test_cells_with_any_quotes_equal_those_of_csv(tmp_path: Path):
    draw = random.Random(0)
    parts = ['"', '""', "a", "b ", "é", "\t"]
    cells = [
        ["".join(draw.choices(parts, (3, 2, 4, 4, 1, 0.3), k=draw.randint(1, 6))) for _ in range(2)]
        for _ in range(3000)
    ]
    lines = ["\t".join([str(number), *pair]) for number, pair in enumerate(cells)]
    path = tmp_path / "corpus.tsv"
    path.write_text("id\ttext\ttitle\n" + "\n".join(lines) + "\n", encoding="utf-8")
    found, reader = read(path)
    expected = {}
    for line in lines:
        rows = list(csv.reader(io.StringIO(f"{line}\nnext\n"), delimiter="\t"))
        # a quote that is open at the end of a line would join it with the next one
        if len(rows) == 2 and len(rows[0]) == 3 and rows[0][1].strip():
            expected[rows[0][0]] = (rows[0][1], rows[0][2])
    assert found == expected
    assert len(expected) + reader.malformed == len(lines)
    assert 500 < len(expected) < 2900


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('"the ""old"" town"', 'the "old" town'),
        ('"the old" town', "the old town"),
        ('the "old" town', 'the "old" town'),
        ('"a\ttab"', "a\ttab"),
        ('""', None),
        ('"an open quote', None),
    ],
)
def test_quotes_in_a_passage(tmp_path: Path, cell, text):
    path = tmp_path / "corpus.tsv"
    path.write_text(f"id\ttext\ttitle\n1\t{cell}\tt\n2\tnext\tt\n", encoding="utf-8")
    found, reader = read(path)
    assert found == {**({} if text is None else {"1": (text, "t")}), "2": ("next", "t")}
    assert reader.malformed == (text is None)


def test_ids_take_eight_bytes_each_and_are_found_again(monkeypatch):
    monkeypatch.setattr(compact_ids, "RECENT", 100)
    draw, ids, expected = random.Random(0), compact_ids.CompactIds(), set()
    for _ in range(5_000):
        number = draw.choice([draw.getrandbits(64), draw.randint(0, 3_000), 2**64 - 1])
        assert ids.add(number) == (number not in expected)
        expected.add(number)
    assert len(ids) == len(expected)
    parts = ids._sorted
    assert sum(part.nbytes for part in parts) == 8 * sum(map(len, parts)) >= 8 * (len(expected) - 100)
    assert len(parts) <= 8
