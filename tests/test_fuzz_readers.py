"""Mutated inputs for every reader: a small part of them, and all 100,000 in `make test-long`."""

from __future__ import annotations

import logging
import warnings

import pytest

from fuzz_reader import Reader
from fuzz_readers import fuzz, mutated, run


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def test_mutated_inputs_give_errors_of_ours_and_lose_no_record():
    assert [(failure.reader, failure.number, failure.kind) for failure in fuzz(3000)] == []


@pytest.mark.long
def test_100_000_mutated_inputs_give_errors_of_ours_and_lose_no_record():
    assert [(failure.reader, failure.number, failure.kind) for failure in fuzz(100_000)] == []


def test_the_search_finds_exceptions_lost_records_and_errors_without_a_file(tmp_path):
    broken = Reader("x.json", b"[1]", lambda path: 1 / 0)
    found = run(broken, "broken", b"[1]", 0, tmp_path)
    assert found is not None
    assert found.kind.startswith("ZeroDivisionError in test_fuzz_readers")
    losing = Reader("x.json", b"[1]", lambda path: 1, records=lambda content: 2)
    lost = run(losing, "losing", b"[1]", 0, tmp_path)
    assert lost is not None
    assert (lost.kind, lost.detail) == ("lost records", "1 of 2")

    def unnamed(path):
        from graftwork.errors import DataError

        raise DataError("something")

    named = run(Reader("x.json", b"", unnamed), "unnamed", b"", 0, tmp_path)
    assert named is not None
    assert named.kind == "unnamed DataError"
    assert mutated(broken, "a", 3) == mutated(broken, "a", 3)
