"""Contract of the gradient bank."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bank_writer import FINGERPRINT, LAYOUT, gradient, open_bank
from graftwork.errors import ConfigError, NonFiniteError
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.errors import (
    BankCorruptionError,
    BankLockedError,
    DuplicatePassageError,
    FingerprintMismatchError,
    MissingGradientError,
)
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import Appended
from object_store import Files


def filled(location: str | Path) -> GradientBank:
    opened = open_bank(location, "float32")
    opened.append([gradient(number) for number in range(20)])
    return opened


@pytest.fixture
def bank(location: str | Path) -> GradientBank:
    return filled(location)


@pytest.fixture
def local_bank(tmp_path: Path) -> GradientBank:
    """Local bank, for tests that do not depend on the backend."""
    return filled(tmp_path / "bank")


def test_get_returns_gradients_in_requested_order(bank):
    names = ["p7", "p0", "p19", "p7"]
    found = bank.get(names)
    assert torch.equal(found, torch.from_numpy(np.stack([gradient(int(n[1:])).values for n in names])))
    assert bank.get(names, dtype=torch.bfloat16).dtype == torch.bfloat16
    row = bank.rows(["p3"])["p3"]
    assert (row["tokens"], row["loss"], row["truncated"]) == (13, 1.5, False)
    assert row["norm"] == pytest.approx(float(np.linalg.norm(gradient(3).values)))
    assert bank.get([]).shape == (0, LAYOUT.size)


def test_named_tensors_and_unusual_ids_are_accepted(local_bank):
    item = gradient(99)
    odd = 'it\'s "odd" %_\\ é 日本'
    local_bank.append(
        [replace(item, id=odd, values={k: torch.from_numpy(v.copy()) for k, v in LAYOUT.split(item.values).items()})]
    )
    assert np.array_equal(local_bank.get([odd])[0].numpy(), item.values)
    assert local_bank.delete([odd]) == ()
    assert local_bank.contains([odd, "p1"]) == {odd: False, "p1": True}


def test_equal_texts_share_one_record(bank):
    assert bank.append([gradient(3), gradient(20), gradient(20)]) == Appended(written=1, skipped=2)
    alias = replace(gradient(3), id="other")
    assert bank.append([alias]) == Appended(aliased=1)
    assert (bank.stats()["ids"], bank.stats()["records"]) == (22, 21)
    bank.delete(["p3"])
    bank.compact()
    assert np.array_equal(bank.get(["other"])[0].numpy(), gradient(3).values)


def test_id_with_another_text_is_rejected_or_replaced(bank):
    changed = replace(gradient(50), id="p3")
    with pytest.raises(DuplicatePassageError, match="'p3'"):
        bank.append([gradient(30), changed])
    assert len(bank) == 20
    assert bank.append([gradient(30), changed], replace=True) == Appended(written=2, replaced=1)
    assert np.array_equal(bank.get(["p3"])[0].numpy(), gradient(50).values)
    assert len(bank) == 21
    assert bank.append([gradient(3)], replace=True) == Appended(aliased=1, replaced=1)
    assert verify(bank).whole
    with pytest.raises(DuplicatePassageError):
        bank.append([replace(gradient(60), id="new"), replace(gradient(61), id="new")])


def test_missing_passages_raise_or_are_skipped(local_bank):
    with pytest.raises(MissingGradientError, match="'nobody'") as caught:
        local_bank.get(["p1", "nobody"])
    assert caught.value.ids == ("nobody",)
    assert local_bank.get(["p1", "nobody", "p2"], on_missing="skip").shape[0] == 2


def test_sums_are_linear_and_bitwise_independent_of_order(bank):
    weights = {"p1": 2.0, "p2": -0.5, "p3": 1.0, "p10": 0.25}
    expected = sum(weight * gradient(int(name[1:])).values.astype(np.float64) for name, weight in weights.items())
    sums = [bank.sum(dict(order)) for order in itertools.permutations(weights.items())]
    assert all(torch.equal(sums[0], other) for other in sums)
    assert np.allclose(sums[0].numpy(), expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(bank.sum({}), torch.zeros(LAYOUT.size))
    bank.append([replace(gradient(1), id="alias")])
    assert torch.equal(bank.sum({"p1": 1.0, "alias": 1.0}), 2 * bank.get(["p1"])[0])


def test_invalid_gradients_are_rejected(local_bank):
    with pytest.raises(NonFiniteError, match="'p40' that is not finite"):
        local_bank.append([replace(gradient(40), values=np.full(LAYOUT.size, np.nan))])
    with pytest.raises(ConfigError, match="3 numbers"):
        local_bank.append([replace(gradient(40), values=np.zeros(3))])
    with pytest.raises(ConfigError, match="without an id"):
        local_bank.append([replace(gradient(40), id="")])
    assert len(local_bank) == 20


def test_fingerprint_mismatch_names_the_entry(local_bank):
    for name in FINGERPRINT:
        with pytest.raises(FingerprintMismatchError, match=name) as caught:
            GradientBank(local_bank.backend, fingerprint={**FINGERPRINT, name: "another"})
        assert caught.value.field == name
    with pytest.raises(FingerprintMismatchError, match="adapter"):
        GradientBank(local_bank.backend, fingerprint={**FINGERPRINT, "adapter": "x"})
    GradientBank(local_bank.backend, fingerprint=dict(FINGERPRINT)).close()


def test_reader_keeps_its_snapshot_until_refresh(bank):
    with GradientBank(bank.backend, cache_bytes=0) as reader:
        bank.delete(["p3"])
        bank.append([gradient(20)])
        bank.compact()
        assert len(reader) == 20
        assert np.array_equal(reader.get(["p3"])[0].numpy(), gradient(3).values)
        assert reader.contains(["p20"]) == {"p20": False}
        reader.refresh()
        assert reader.contains(["p3", "p20"]) == {"p3": False, "p20": True}
        with pytest.raises(ConfigError, match="mode 'a'"):
            reader.delete(["p1"])


def test_compaction_frees_deleted_records_without_readers(location):
    bank = open_bank(location)
    layout_bytes = bank.manifest.stride
    bank.append([gradient(number) for number in range(400)])
    reader = GradientBank(location)
    assert bank.delete([f"p{n}" for n in range(0, 400, 2)]) == ()
    assert GradientBank(location).contains(["p0", "p1"]) == {"p0": False, "p1": True}
    bank.compact()
    assert reader.get(["p0"]).shape[0] == 1
    reader.close()
    assert bank.contains(["p0"]) == {"p0": False}
    bank.compact()
    data = Files(bank.backend).size("records.lance/data")
    # rows of 1 KB: the values and their metadata
    assert data <= 200 * (layout_bytes + 182) * 1.05
    assert verify(bank).whole


def test_tag_of_dead_reader_is_removed(bank):
    import subprocess
    import sys

    code = (
        "import sys, os; from graftwork.methods.regrad.bank.gradient_bank import GradientBank as B; "
        "b = B(sys.argv[1]); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(bank.backend)], check=False)
    assert len(bank.snapshot.records.tags.list()) == 1
    bank.compact()
    assert not bank.snapshot.records.tags.list()


def test_cache_is_bounded_and_transparent(local_bank):
    small = GradientBank(local_bank.backend, cache_bytes=3 * local_bank.manifest.stride)
    for _ in range(2):
        for number in range(20):
            assert np.array_equal(small.get([f"p{number}"])[0].numpy(), gradient(number).values)
    assert len(small._reader._cache) == 3
    small.close()


def test_lock_timeout_names_the_holder(bank):
    impatient = GradientBank(bank.backend, "a", lock_seconds=0.1)
    with bank.backend.write_lock(1), pytest.raises(BankLockedError, match=r"by process \d+ on .*, for \d+ s"):
        impatient.append([gradient(30)])
    assert impatient.append([gradient(30)]).written == 1


def test_creating_over_a_bank_and_opening_none_are_rejected(bank, tmp_path: Path):
    with pytest.raises(ConfigError, match="already"):
        GradientBank.create(bank.backend, fingerprint={}, layout=LAYOUT)
    with pytest.raises(ConfigError, match="Found no gradient bank"):
        GradientBank(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="float32, bfloat16, int8"):
        GradientBank.create(tmp_path / "x", fingerprint={}, layout=LAYOUT, precision="int4")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_record_overhead_is_below_one_kibibyte(tmp_path: Path, precision):
    bank = open_bank(tmp_path / "bank", precision)
    bank.append([gradient(number) for number in range(64)])
    bank.compact()
    size = Files(bank.backend).size()
    assert bank.stats()["bytes"] == size
    assert size <= 64 * (bank.manifest.stride + 1024)
    assert bank.stats()["bytes_per_record"] == bank.manifest.stride
    schema = bank.snapshot.records.schema.field("value").type
    assert schema.byte_width == bank.manifest.stride


# corruption


def data_file(bank: GradientBank, name: str = "records.lance") -> tuple[Files, str]:
    files = Files(bank.backend)
    (path,) = files.names(f"{name}/data")
    return files, path


def test_flipped_bit_is_detected_and_names_the_passage(bank):
    files, path = data_file(bank)
    content = bytearray(files.read(path))
    offset = content.index(gradient(7).values.tobytes()) + 1001
    content[offset] ^= 4
    files.write(path, bytes(content))
    with GradientBank(bank.backend) as reader:
        found = verify(reader)
        assert found.bad_ids == ("p7",)
        assert not found.whole
        with pytest.raises(BankCorruptionError, match="'p7'") as caught:
            reader.get(["p6", "p7"])
        assert caught.value.ids == ("p7",)
        assert reader.get(["p6", "p8"]).shape[0] == 2
    # without verification, the damage is undetected
    with GradientBank(bank.backend, verify="never") as careless:
        assert not np.array_equal(careless.get(["p7"])[0].numpy(), gradient(7).values)


@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_broken_data_file_raises_corruption_error(bank, harm):
    files, path = data_file(bank)
    files.write(path, files.read(path)[:5000]) if harm == "cut" else files.remove(path)
    with GradientBank(bank.backend) as reader:
        with pytest.raises(BankCorruptionError):
            reader.get(["p1"])
        found = verify(reader)
    assert len(found.bad_ids) == 20
    assert Path(path).name in found.problems[0]


@pytest.mark.parametrize("dataset", ["records.lance", "ids.lance"])
def test_lost_manifest_is_detected_although_lance_opens_the_previous_version(bank, dataset):
    import lance

    files = Files(bank.backend)
    names = files.names(f"{dataset}/_versions")
    files.remove(min(name for name in names if name.endswith(".manifest")))  # named downwards from 2**64
    lance.dataset(bank.backend.uri(dataset))
    with pytest.raises(BankCorruptionError):
        GradientBank(bank.backend)
    with pytest.raises(BankCorruptionError):
        bank.append([gradient(30)])


def test_changed_or_missing_json_files_are_detected(bank):
    files = Files(bank.backend)
    for name in ("bank.json", "seal.json"):
        whole = files.read(name)
        value = json.loads(whole)
        key = "precision" if name == "bank.json" else "ids"
        files.write(name, json.dumps({**value, key: "int8" if key == "precision" else 3}).encode())
        with pytest.raises(BankCorruptionError, match="was changed"):
            GradientBank(bank.backend)
        for other in (whole[:20], b"[1]", b"1"):
            files.write(name, other)
            with pytest.raises(BankCorruptionError, match="not readable"):
                GradientBank(bank.backend)
        files.remove(name)
        with pytest.raises(BankCorruptionError, match=name):
            GradientBank(bank.backend)
        files.write(name, whole)


def test_damaged_id_is_detected(bank):
    files, path = data_file(bank, "ids.lance")
    content = files.read(path)
    key = bank.keys(["p7"])["p7"].encode()
    position = content.index(key) if key in content else None
    if position is None:
        pytest.skip("this version of Lance compresses the column")
    other = b"0" if content[position : position + 1] != b"0" else b"1"
    files.write(path, content[:position] + other + content[position + 1 :])
    with GradientBank(bank.backend) as reader, pytest.raises(BankCorruptionError, match="'p7'"):
        reader.get(["p7"])
