"""Banks in object stores, as far as they differ from folders; test_bank.py runs on both backends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import bank_writer
from bank_writer import FINGERPRINT, LAYOUT, gradient, open_bank
from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank import files as bank_files
from graftwork.methods.regrad.bank import object_store as bank_object_store
from graftwork.methods.regrad.bank.backends import LOCK_FILE
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.errors import BankCorruptionError, BankLockedError, BankUnreachableError
from graftwork.methods.regrad.bank.files import MANIFEST_FILE, holds_bank, text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.object_store import ObjectStoreBackend
from graftwork.methods.regrad.bank.opening import backend_for
from graftwork.methods.regrad.bank.records import encoded
from graftwork.methods.regrad.bank.transfer import export, import_export, merge, record_digests
from object_store import Files, ObjectStore

COMMAND = [sys.executable, bank_writer.__file__]
READ_ONLY = ("GET", "HEAD")


def backend_with(address: str, renew: float, expire: float) -> ObjectStoreBackend:
    return ObjectStoreBackend("s3", address.removeprefix("s3://"), renew, expire)


def test_bank_is_bitwise_equal_to_a_local_one(address, tmp_path: Path):
    banks = [open_bank(where) for where in (tmp_path / "bank", address)]
    for bank in banks:
        bank.append([gradient(number) for number in range(12)])
        bank.append([gradient(number) for number in range(8, 20)])
        bank.delete(["p2", "p9"])
    left, right = banks
    assert dict(record_digests(left)) == dict(record_digests(right))
    assert left.commit_record.ids_digest == right.commit_record.ids_digest
    weights = {f"p{number}": 0.5 + number for number in (0, 3, 7, 19)}
    assert torch.equal(left.sum(weights), right.sum(weights))
    assert torch.equal(left.get(left.ids()), right.get(left.ids()))


def test_merge_and_export_between_backends(address, tmp_path: Path):
    local, stored = open_bank(tmp_path / "bank"), open_bank(address)
    local.append([gradient(number) for number in range(30)])
    assert merge(stored, [local]).written == 30
    again = open_bank(tmp_path / "again")
    with GradientBank(address) as reader:
        assert merge(again, [reader]).written == 30
        assert export(reader, tmp_path / "out") == 30
    whole = dict(record_digests(local))
    assert dict(record_digests(again)) == whole
    brought = import_export(tmp_path / "out", f"{address}-brought")
    assert dict(record_digests(brought)) == whole
    # an interrupted import is resumed
    assert import_export(tmp_path / "out", f"{address}-brought").ids() == local.ids()


def test_children_of_a_backend_are_listed_and_removed(address):
    parts = backend_for(address).sibling(".parts")
    assert parts.children() == []
    for name in ("1-of-2", "0-of-2"):
        open_bank(parts.child(name)).append([gradient(1)])
    assert [str(part) for part in parts.children()] == [f"{address}.parts/0-of-2", f"{address}.parts/1-of-2"]
    open_bank(address)
    parts.remove()
    assert (parts.children(), parts.size()) == ([], 0)
    assert holds_bank(address)


def test_request_counts_of_get_refresh_and_append(object_store: ObjectStore, address):
    bank = open_bank(address)
    for start in (0, 16):
        bank.append([gradient(number) for number in range(start, start + 16)])
    reader = GradientBank(address, cache_bytes=0)
    reader.get(["p1"])

    def requests(work) -> int:
        object_store.requests.clear()
        work()
        return len(object_store.requests)

    assert requests(lambda: reader.get(["p1", "p20"])) <= 12
    assert requests(reader.refresh) == 1
    assert requests(lambda: bank.append([gradient(number) for number in range(32, 48)])) <= 40


# dead and paused writers


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate writers on different machines."""
    monkeypatch.setattr(bank_object_store, "_machine", lambda: None)


def test_renewed_lease_does_not_expire(address, elsewhere):
    open_bank(address)
    first, second = backend_with(address, 0.05, 0.4), backend_with(address, 0.05, 0.4)
    with first.write_lock(1):
        with pytest.raises(BankLockedError, match=r"by process \d+ on .*, for \d+ s"), second.write_lock(0.9):
            pass
        first.check_lock()
    with second.write_lock(0):
        pass


def test_expired_lease_is_taken_over_and_detected(address, elsewhere):
    open_bank(address)
    silent, other = backend_with(address, 100, 0.3), backend_with(address, 0.1, 0.3)
    started = time.monotonic()
    with silent.write_lock(1), other.write_lock(10):
        assert time.monotonic() - started >= 0.3
        with pytest.raises(BankLockedError, match="taken over by another writer"):
            silent.check_lock()
    with silent.write_lock(0):
        silent.check_lock()


def test_paused_writer_does_not_write_after_takeover(address, elsewhere):
    open_bank(address)
    asleep, other = (GradientBank(backend_with(address, 100, 0.3), "a") for _ in range(2))

    def made_slowly():
        # another writer adds the same passages during slow encoding
        assert other.append([gradient(number) for number in range(10)]).written == 10
        return encoded(gradient(3), asleep.layout, asleep.precision)

    with pytest.raises(BankLockedError, match="repeat the others"):
        asleep.append_records([("p3", text_key("text 3"), made_slowly)])
    assert asleep.append([gradient(3), gradient(10)]).written == 1
    with GradientBank(address) as reader:
        assert verify(reader).whole
        assert len(reader) == 11


def test_unreadable_lease_is_held_until_expiry(address, elsewhere):
    open_bank(address)
    Files(backend_for(address)).write(LOCK_FILE, b"\xff no json")
    with pytest.raises(BankLockedError, match="by another process"), backend_with(address, 1, 5).write_lock(0.1):
        pass
    with backend_with(address, 1, 0.2).write_lock(5):
        pass


def test_lease_is_kept_when_the_response_is_lost(object_store: ObjectStore, address):
    open_bank(address)
    lost = []

    def answer_twice(request):
        # the first response is lost, and the client retries
        if request["REQUEST_METHOD"] == "PUT" and request["PATH_INFO"].endswith(LOCK_FILE) and not lost:
            lost.append(object_store.answer(request))
            return "503 Slow Down"
        return None

    object_store.fault = answer_twice
    with backend_for(address).write_lock(2) as _:
        assert lost == [200]


def test_concurrent_creation_is_rejected(location, monkeypatch):
    first = open_bank(location)
    first.append([gradient(1)])
    # the second process checks before the first has finished
    seen = iter([False])
    monkeypatch.setattr(bank_files, "holds_bank", lambda where: next(seen, True))
    with pytest.raises(ConfigError, match="already"):
        GradientBank.create(location, fingerprint={"model": "another"}, layout=LAYOUT)
    assert GradientBank(location).contains(["p1"]) == {"p1": True}


def test_two_writers_of_one_process_exclude_each_other(address):
    first, second = open_bank(address), GradientBank(address, "a", lock_seconds=0.2)
    with first.backend.write_lock(1), pytest.raises(BankLockedError, match=f"by process {os.getpid()} on"):
        second.append([gradient(1)])
    assert second.append([gradient(1)]).written == 1
    assert first.append([gradient(1)]).skipped == 1


def killed(address: str, count: int, after: float, batch: int = 4) -> int:
    """Kill a writer `after` seconds and return its last acknowledged passage."""
    process = subprocess.Popen([*COMMAND, address, "0", str(count), str(batch)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    acknowledged = [int(line) for line in process.stdout.read().splitlines()]
    process.stdout.close()
    process.wait()
    return acknowledged[-1] if acknowledged else -1


def kill_and_resume(address: str, tmp_path: Path, kills: list[float], count: int) -> None:
    open_bank(address)
    for after in kills:
        last = killed(address, count, after)
        with GradientBank(address) as reader:
            assert verify(reader).whole
            assert all(reader.contains(f"p{number}" for number in range(last + 1)).values())
    started = time.monotonic()
    bank = open_bank(address)
    bank.append([gradient(number) for number in range(count)])
    # a dead process of this machine is detected without waiting for expiry
    assert time.monotonic() - started < 20
    whole = open_bank(tmp_path / "whole")
    whole.append([gradient(number) for number in range(count)])
    assert dict(record_digests(bank)) == dict(record_digests(whole))
    assert verify(bank).whole


def test_bank_of_killed_writer_is_resumed(address, tmp_path: Path):
    kill_and_resume(address, tmp_path, [0.4], 100)


@pytest.mark.long
def test_repeatedly_killed_writers_lose_nothing(address, tmp_path: Path):
    draw = random.Random(1)
    kill_and_resume(address, tmp_path, [draw.uniform(0.02, 0.8) for _ in range(20)], 600)


def test_interrupted_creation_is_resumed(location):
    whole = open_bank(location)
    files = Files(whole.backend)
    made = ["seal.json", *files.names("ids.lance"), *files.names("records.lance")]
    for count in range(len(made) + 1):
        for name in (MANIFEST_FILE, *made[:count]):
            with suppress(FileNotFoundError):
                files.remove(name)
        assert len(open_bank(location)) == 0
    bank = open_bank(location)
    bank.append([gradient(1)])
    assert verify(bank).whole
    files.remove(MANIFEST_FILE)
    with pytest.raises(BankCorruptionError, match=r"holds gradients but no bank\.json"):
        open_bank(location)


def test_remote_reader_tag_expires(address):
    bank = open_bank(address)
    bank.append([gradient(1)])
    bank.snapshot.records.tags.create("reader-elsewhere-1-1", bank.snapshot.records.version)
    bank.compact()
    assert list(bank.snapshot.records.tags.list()) == ["reader-elsewhere-1-1"]
    bank.backend.tag_lifetime = timedelta(0)
    bank.compact()
    assert not bank.snapshot.records.tags.list()


# invalid locations, and failing or restricted stores


def test_invalid_locations_are_rejected_in_one_line(object_store, address, monkeypatch):
    for wrong, message in (
        ("ftp://host/bank", "expected a folder, or an address with one of: s3://, gs://, az://"),
        ("s3://bucket", "such as s3://bucket/bank"),
        ("s3://bucket/a bank", "letters, digits"),
        ("gs://bucket//x", "letters, digits"),
        (address, "Found no gradient bank"),
        ("s3://nobucket/bank", "NoSuchBucket|404"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            GradientBank(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(BankUnreachableError, match="nobucket"):
        GradientBank.create("s3://nobucket/bank", fingerprint=FINGERPRINT, layout=LAYOUT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(BankUnreachableError, match="Check the bucket, and its address, region and credentials"):
        GradientBank(address)
    assert time.monotonic() - started < 20
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(BankUnreachableError, match="AWS_ALLOW_HTTP=true"):
        GradientBank(address)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_google_and_azure_stores_are_contacted(scheme, monkeypatch):
    # no server responds; the message names the kind of store
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv(
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        json.dumps(
            {
                "gcs_base_url": "http://127.0.0.1:9",
                "disable_oauth": True,
                "client_email": "",
                "private_key": "",
                "private_key_id": "",
            }
        ),
    )
    name = {"gs": "GCS", "az": "Azure"}[scheme]
    with pytest.raises(BankUnreachableError, match=f"{scheme}://bucket/bank cannot be reached: .*{name}"):
        GradientBank(f"{scheme}://bucket/bank")


def test_store_without_conditional_writes_is_rejected(object_store: ObjectStore, address):
    def forget_conditions(request):
        request.pop("HTTP_IF_NONE_MATCH", None)

    object_store.fault = forget_conditions
    with pytest.raises(ConfigError, match="If-None-Match"):
        open_bank(address)


def test_read_only_store_is_readable(object_store: ObjectStore, address):
    open_bank(address).append([gradient(number) for number in range(200)])
    object_store.fault = lambda request: None if request["REQUEST_METHOD"] in READ_ONLY else "403 Access Denied"
    reader = GradientBank(address, cache_bytes=0)
    assert reader.get(["p1"]).shape[0] == 1
    with pytest.raises(BankUnreachableError, match="403") as caught:
        GradientBank(address, "a").append([gradient(200)])
    assert "\n" not in str(caught.value)
    # without a tag, a compaction may remove its files; the reader then refreshes
    object_store.fault = lambda request: None
    with open_bank(address) as writer:
        writer.delete([f"p{number}" for number in range(0, 200, 2)])
        writer.compact()
    assert reader.get(["p151"]).shape[0] == 1
    assert reader.contains(["p150"]) == {"p150": False}


@pytest.mark.parametrize(
    ("status", "breaks"),
    [
        # denied requests are not retried
        ("403 Access Denied", "seal.json"),
        *(
            pytest.param("500 Internal Error", f"{dataset}.lance/{part}", marks=pytest.mark.long)
            for dataset in ("records", "ids")
            for part in ("data", "_versions")
        ),
    ],
)
def test_outage_is_not_corruption_and_writing_resumes(object_store: ObjectStore, address, status, breaks):
    bank = open_bank(address)
    bank.append([gradient(1)])
    reader = GradientBank(address, cache_bytes=0)
    started, down = time.monotonic(), []

    def fail(request):
        # no request succeeds after the first one of this kind
        if breaks in request["PATH_INFO"] and request["REQUEST_METHOD"] == "PUT":
            down.append(True)
        return status if down else None

    object_store.fault = fail
    with pytest.raises(BankUnreachableError):
        bank.append([gradient(2), gradient(3)])
    with pytest.raises(BankUnreachableError):
        reader.get(["p1"])
    assert time.monotonic() - started < 60
    object_store.fault = lambda request: None
    assert reader.get(["p1"]).shape[0] == 1
    assert verify(GradientBank(address)).whole
    # immediately, although the release of the lease failed
    bank.lock_seconds = 5
    bank.append([gradient(2), gradient(3)])
    assert bank.contains(["p1", "p2", "p3"]) == {"p1": True, "p2": True, "p3": True}
    assert verify(bank).whole
