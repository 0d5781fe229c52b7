"""Killed and concurrent writers."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bank_writer
from bank_writer import gradient, open_bank
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.transfer import record_digests

COMMAND = [sys.executable, bank_writer.__file__]


def start(folder: str | Path, first: int, end: int, batch: int) -> subprocess.Popen[str]:
    words = [*COMMAND, str(folder), str(first), str(end), str(batch)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def expected(tmp_path: Path, count: int) -> dict[str, int]:
    whole = open_bank(tmp_path / "whole")
    whole.append([gradient(number) for number in range(count)])
    return dict(record_digests(whole))


def test_killed_writer_loses_no_acknowledged_batch(tmp_path: Path):
    draw, folder, count = random.Random(0), tmp_path / "bank", 400
    open_bank(folder)
    for _ in range(3):
        process = start(folder, 0, count, 4)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.02, 0.5))
        process.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in process.stdout.read().splitlines()]
        process.stdout.close()
        process.wait()
        with GradientBank(folder) as reader:
            assert verify(reader).whole
            if acknowledged:
                assert all(reader.contains(f"p{number}" for number in range(acknowledged[-1] + 1)).values())
    process = start(folder, 0, count, 50)
    process.communicate()
    assert process.returncode == 0
    with GradientBank(folder) as reader:
        assert dict(record_digests(reader)) == expected(tmp_path, count)


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.long)])
def test_concurrent_writers_finish_without_duplicates(kind, request, tmp_path: Path):
    location = tmp_path / "bank" if kind == "folder" else request.getfixturevalue("address")
    open_bank(location)
    writers = [start(location, 0, 60, 4), start(location, 30, 90, 4)]
    for process in writers:
        process.communicate()
        assert process.returncode == 0
    with GradientBank(location) as reader:
        assert verify(reader).whole
        assert (reader.stats()["ids"], reader.stats()["records"]) == (90, 90)
        assert dict(record_digests(reader)) == expected(tmp_path, 90)
