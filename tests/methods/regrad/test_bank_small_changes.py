"""Many small changes of a bank: what they cost is counted, and what is found is compared with a dictionary."""

from __future__ import annotations

import random
from dataclasses import replace

import lance
import numpy as np
import pytest

from bank_writer import gradient, open_bank
from graftwork.methods.regrad.bank import compaction, lookup
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.files import text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank


@pytest.fixture
def reads(monkeypatch):
    """Fragments that each scan of a dataset reads; None is a search of the index alone, "all" a scan of everything."""
    seen = []
    scanner = lance.LanceDataset.scanner

    def counted(self, *args, **kwargs):
        named = kwargs.get("fragments")
        searched = None if kwargs.get("fast_search") else "all"
        seen.append(searched if named is None else len(named))
        return scanner(self, *args, **kwargs)

    monkeypatch.setattr(lance.LanceDataset, "scanner", counted)
    return seen


def test_a_fetch_after_an_addition_reads_only_the_new_fragments(tmp_path, reads):
    bank = open_bank(tmp_path / "bank", "float32")
    for number in range(20):
        bank.append([gradient(number)])
    reader = GradientBank(tmp_path / "bank", cache_bytes=0)
    reader.get(["p1", "p19"])
    for number in range(20, 23):
        bank.append([gradient(number)])
        reader.refresh()
        reads.clear()
        found = reader.get(["p1", f"p{number}", "p10"])
        assert np.array_equal(found[1], gradient(number).values)
        # one new fragment of each dataset; no scan of the 20 others
        assert reads == [1, 1]


def test_an_addition_reads_only_what_the_writer_has_not_seen(tmp_path, reads):
    bank = open_bank(tmp_path / "bank", "float32")
    for number in range(30):
        reads.clear()
        bank.append([gradient(number)])
    # the ids and the records of the addition before, and two searches of the indexes
    assert sorted(map(str, reads)) == ["1", "1", "None", "None"]


@pytest.mark.parametrize("seed", range(2))
def test_random_changes_leave_what_a_dictionary_holds(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(compaction, "MERGE_FRAGMENTS", 7)
    monkeypatch.setattr(compaction, "_MERGED_ROWS", 9)
    monkeypatch.setattr(lookup, "INDEX_ROWS", 20)
    bank = open_bank(tmp_path / "bank", "float32")
    reader, held, draw = GradientBank(tmp_path / "bank", cache_bytes=0), {}, random.Random(seed)
    for step in range(40):
        numbers = [draw.randrange(25) for _ in range(draw.choice((1, 1, 1, 3)))]
        action = draw.random()
        if action < 0.6:
            rows = {
                number: replace(gradient(number), text=f"text {draw.randrange(3)} of {number}") for number in numbers
            }
            bank.append(rows.values(), replace=True)
            held |= {f"p{number}": row for number, row in rows.items()}
        elif action < 0.9:
            names = [f"p{number}" for number in numbers]
            assert set(bank.delete(names)) == {name for name in names if name not in held}
            for name in names:
                held.pop(name, None)
        elif action < 0.95:
            bank.merge_small()
        else:
            bank.compact()
        if step % 5 == 0:
            reader.refresh()
            every = [f"p{number}" for number in range(25)]
            for one in (bank, reader):
                assert one.keys(every) == {name: text_key(row.text) for name, row in held.items()}
                assert one.ids() == sorted(held)
                assert one.get(sorted(held)).shape[0] == len(held)
            assert bank.holds([text_key(row.text) for row in held.values()]) == {
                text_key(r.text) for r in held.values()
            }
    assert verify(bank).whole


def test_small_files_are_merged_at_a_bound_and_large_ones_not_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "MERGE_FRAGMENTS", 8)
    monkeypatch.setattr(compaction, "_MERGED_ROWS", 16)
    bank = open_bank(tmp_path / "bank", "float32")
    most, kept = 0, set()
    for number in range(40):
        bank.append([gradient(number)])
        fragments = bank.snapshot.records.get_fragments()
        most = max(most, len(fragments))
        large = {one.metadata.files[0].path for one in fragments if one.physical_rows >= 16}
        assert kept <= large, "a large fragment was rewritten"
        kept = large
    # at most 8 small ones beside those of 16 rows
    assert most <= 8 + 40 // 16
    assert kept
    assert len(list((tmp_path / "bank").rglob("*"))) < 200
    assert bank.get([f"p{number}" for number in range(40)]).shape[0] == 40


def test_merging_on_request_leaves_one_file_and_says_whether_it_merged(tmp_path):
    bank = open_bank(tmp_path / "bank", "float32")
    for number in range(5):
        bank.append([gradient(number)])
    assert not bank.merge_small(at_least=6)
    assert bank.merge_small()
    assert bank.stats()["batches"] == 1
    assert not bank.merge_small()


def test_every_file_is_synced_before_the_commit_record_is_written(tmp_path, monkeypatch):
    from graftwork.methods.regrad.bank import backends

    synced = []
    sync = backends.sync_file
    monkeypatch.setattr(backends, "sync_file", lambda path: (sync(path), synced.append(str(path)))[0])
    written = backends.LocalBackend.write_json

    def write(self, name, value):
        files = {str(path) for path in (tmp_path / "bank").rglob("*.lance/**/*") if path.is_file()}
        assert files <= set(synced)
        folders = {str(path.parent) for path in (tmp_path / "bank").rglob("*.lance/**/*") if path.is_file()}
        assert folders <= set(synced)
        written(self, name, value)

    bank = open_bank(tmp_path / "bank", "float32")
    monkeypatch.setattr(backends.LocalBackend, "write_json", write)
    for number in range(3):
        synced_before = len(synced)
        bank.append([gradient(number)])
        assert len(synced) > synced_before
