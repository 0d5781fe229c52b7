"""Tables of examples: equal to tuples, cached by content, bounded, and never trusted when damaged."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest

from graftwork.core import stored_rows
from graftwork.core.cache import ROWS, cache_sizes, clear_cache, remembered, remove_oldest
from graftwork.core.example import Example
from graftwork.core.stored_rows import (
    JoinedRows,
    StoredRows,
    has_metadata,
    join_rows,
    keys_of,
    rows_digest,
    select_rows,
    store_rows,
    texts_of,
)
from graftwork.errors import ConfigError

ROWS_OF_TEST = tuple(
    Example(
        f"k{number}",
        f"input {number} \u2028 é\r",
        f"target {number}",
        (f"a{number}", ""),
        {"turns": (("user", "x"), ("assistant", "y")), "n": number, "deep": {"a": (1, (2.5, None, True))}}
        if number % 3
        else {},
        None if number % 2 else f"pair {number}",
    )
    for number in range(25)
)


@pytest.fixture(autouse=True)
def small_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_rows, "IN_MEMORY", 4)
    monkeypatch.setattr(stored_rows, "BATCH", 7)


def test_a_table_holds_what_the_objects_hold():
    rows = store_rows(lambda: iter(ROWS_OF_TEST))
    assert isinstance(rows, StoredRows)
    assert tuple(rows) == ROWS_OF_TEST
    assert [rows[index] for index in (0, 24, -1, 13)] == [ROWS_OF_TEST[index] for index in (0, 24, -1, 13)]
    assert tuple(rows[3:20:2]) == ROWS_OF_TEST[3:20:2]
    assert tuple(rows[3:20:2][::-1][1:3]) == ROWS_OF_TEST[3:20:2][::-1][1:3]
    assert tuple(rows.select([5, 0, 5])) == (ROWS_OF_TEST[5], ROWS_OF_TEST[0], ROWS_OF_TEST[5])
    assert type(rows[1].answers) is tuple
    assert type(rows[1].metadata["turns"][0]) is tuple
    with pytest.raises(IndexError):
        rows[25]
    assert tuple(pickle.loads(pickle.dumps(rows.select([4, 2])))) == (ROWS_OF_TEST[4], ROWS_OF_TEST[2])


def test_few_rows_stay_objects():
    assert store_rows(lambda: iter(ROWS_OF_TEST[:4])) == ROWS_OF_TEST[:4]
    assert cache_sizes() == {}


@pytest.mark.parametrize("unsuitable", [{"x": {1}}, {"x": object}, {1: "integer key"}, {"x": float("nan")}, {"x": [1]}])
def test_rows_that_a_table_would_change_stay_objects(unsuitable):
    rows = (*ROWS_OF_TEST[:10], Example("k", "i", "t", (), unsuitable))
    assert store_rows(lambda: iter(rows)) == rows


def test_functions_on_tables_equal_those_on_tuples():
    table = store_rows(lambda: iter(ROWS_OF_TEST))
    for rows in (table, ROWS_OF_TEST, join_rows([table[:10], ROWS_OF_TEST[10:]])):
        assert tuple(rows) == ROWS_OF_TEST
        assert keys_of(rows) == [row.key for row in ROWS_OF_TEST]
        assert list(texts_of(rows)) == [(row.text, row.target) for row in ROWS_OF_TEST]
        assert has_metadata(rows, "turns")
        assert not has_metadata(rows, "labelled")
        assert tuple(select_rows(rows, [3, 1])) == (ROWS_OF_TEST[3], ROWS_OF_TEST[1])
        assert rows[-3] == ROWS_OF_TEST[-3]
        assert list(rows[8:13]) == list(ROWS_OF_TEST[8:13])
    assert isinstance(join_rows([table, table]), JoinedRows)
    assert join_rows([ROWS_OF_TEST[:2], ROWS_OF_TEST[2:]]) == list(ROWS_OF_TEST)


@pytest.mark.parametrize("texts", [[], [("a", "é\u2028")], [("a", "b"), ("", '"')]])
def test_the_digest_of_streamed_texts_is_that_of_the_whole(texts):
    whole = json.dumps([list(row) for row in texts]).encode()
    assert rows_digest(iter(texts)) == hashlib.sha256(whole).hexdigest()


def test_a_cached_table_is_read_in_place_of_its_source(tmp_path):
    made = store_rows(lambda: iter(ROWS_OF_TEST), "k1")
    again = store_rows(lambda: pytest.fail("the source was read again"), "k1")
    assert tuple(made) == tuple(again) == ROWS_OF_TEST
    assert made.key == again.key is not None
    assert made[2:].key not in (None, made.key)
    assert tuple(store_rows(lambda: iter(ROWS_OF_TEST[:9]), "k2")) == ROWS_OF_TEST[:9]


def test_a_damaged_table_is_made_again(tmp_path):
    store_rows(lambda: iter(ROWS_OF_TEST), "k1")
    file = tmp_path / "cache" / ROWS / "k1.arrow"
    content = bytearray(file.read_bytes())
    place = content.index(b"input 11")
    content[place] ^= 1
    file.write_bytes(content)
    assert tuple(store_rows(lambda: iter(ROWS_OF_TEST), "k1")) == ROWS_OF_TEST
    file.with_suffix(".json").write_text("{}")
    assert tuple(store_rows(lambda: iter(ROWS_OF_TEST), "k1")) == ROWS_OF_TEST


def test_a_table_without_key_is_removed_with_its_last_view(tmp_path):
    rows = store_rows(lambda: iter(ROWS_OF_TEST))
    view = rows[3:5]
    del rows
    assert tuple(view) == ROWS_OF_TEST[3:5]
    assert len(list((tmp_path / "cache" / ROWS).iterdir())) == 1
    del view
    assert not list((tmp_path / "cache" / ROWS).iterdir())


def test_a_source_that_fails_leaves_no_table(tmp_path):
    def broken():
        yield from ROWS_OF_TEST
        raise ConfigError("line 26")

    with pytest.raises(ConfigError, match="line 26"):
        store_rows(broken, "k1")
    assert not list((tmp_path / "cache" / ROWS).iterdir())


def test_the_oldest_tables_are_removed_above_the_limit(tmp_path, monkeypatch):
    import os

    for number, name in enumerate(("old", "middle", "new")):
        store_rows(lambda: iter(ROWS_OF_TEST), name)
        for suffix in (".arrow", ".json"):
            os.utime(tmp_path / "cache" / ROWS / f"{name}{suffix}", (number, number))
    size = (tmp_path / "cache" / ROWS / "old.arrow").stat().st_size
    monkeypatch.setenv("GRAFTWORK_CACHE_GB", str(2.5 * size / 1e9))
    remove_oldest(ROWS)
    assert {path.stem for path in (tmp_path / "cache" / ROWS).glob("*.arrow")} == {"middle", "new"}
    assert clear_cache() > 2 * size
    assert cache_sizes() == {}


def test_a_limit_of_zero_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE_GB", "0")
    rows = store_rows(lambda: iter(ROWS_OF_TEST), "k1")
    assert tuple(rows) == ROWS_OF_TEST
    assert rows.key is None
    del rows
    assert not list((tmp_path / "cache" / ROWS).iterdir())


@pytest.mark.parametrize("limit", ["many", "-1", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, limit):
    monkeypatch.setenv("GRAFTWORK_CACHE_GB", limit)
    with pytest.raises(ConfigError, match="GRAFTWORK_CACHE_GB"):
        store_rows(lambda: iter(ROWS_OF_TEST), "k1")


def test_facts_are_remembered_by_key():
    values = iter([{"rows": 3}, {"rows": 4}, {"rows": 5}])
    assert remembered("a", lambda: next(values)) == {"rows": 3}
    assert remembered("a", lambda: next(values)) == {"rows": 3}
    assert remembered("b", lambda: next(values)) == {"rows": 4}
    assert remembered(None, lambda: next(values)) == {"rows": 5}
