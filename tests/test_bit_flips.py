"""A sample of single-bit flips; `python tests/bit_flips.py 500` flips more."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from bit_flips import Area, areas, flip, flips

WHOLE = 500
SAMPLE = 25


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    logging.disable(logging.WARNING)
    yield areas(tmp_path_factory.mktemp("flips"))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("count", "seed"), [pytest.param(SAMPLE, 0, marks=pytest.mark.long), pytest.param(WHOLE, 1, marks=pytest.mark.long)]
)
def test_every_flipped_bit_is_detected_or_harmless(everything, count, seed):
    outcomes = list(flips(everything, count, seed))
    assert [(one.area, one.file, one.bit, one.detail) for one in outcomes if one.kind == "wrong"] == []
    kinds = Counter(one.kind for one in outcomes)
    assert kinds["detected"] > count / 2, kinds


def test_the_search_finds_a_file_that_nothing_protects(tmp_path):
    file = tmp_path / "area" / "numbers.txt"
    file.parent.mkdir()
    file.write_text("12")
    area = Area(file.parent, {"read": lambda: int(file.read_text())}).learn()
    assert flip(area, file.name, 0) == ("wrong", "read returns something else")
    assert flip(area, file.name, 7)[1].startswith("read: UnicodeDecodeError")
    assert file.read_text() == "12"
