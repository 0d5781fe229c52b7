"""Merging, export and import of banks."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bank_writer import FINGERPRINT, LAYOUT, gradient, open_bank
from graftwork.core import faults
from graftwork.errors import ConfigError, DataError, DiskFullError
from graftwork.methods.regrad.bank.check import verify
from graftwork.methods.regrad.bank.errors import DuplicatePassageError, FingerprintMismatchError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.layout import Layout
from graftwork.methods.regrad.bank.records import Appended
from graftwork.methods.regrad.bank.transfer import export, import_export, import_original, merge, record_digests


def test_merged_shards_equal_one_bank(tmp_path: Path):
    whole, target = open_bank(tmp_path / "whole"), open_bank(tmp_path / "target")
    whole.append([gradient(number) for number in range(150)])
    shards = [open_bank(tmp_path / f"shard{part}") for part in range(4)]
    for part, shard in enumerate(shards):
        shard.append([gradient(number) for number in range(150) if number % 4 == part or number < 10])
    done = merge(target, shards)
    assert done.written == 150
    assert done.skipped == 30
    assert dict(record_digests(target)) == dict(record_digests(whole))
    assert merge(target, shards).written == 0
    shards[0].append([replace(gradient(500), id="p1")], replace=True)
    with pytest.raises(DuplicatePassageError):
        merge(target, shards[:1])


def test_mismatching_banks_are_not_merged(tmp_path: Path):
    target = open_bank(tmp_path / "target")
    others = [
        ("model", GradientBank.create(tmp_path / "a", fingerprint={**FINGERPRINT, "model": "x"}, layout=LAYOUT)),
        (
            "tensor layout",
            GradientBank.create(tmp_path / "b", fingerprint=FINGERPRINT, layout=Layout.of([("a", (3,))])),
        ),
        ("precision", GradientBank.create(tmp_path / "c", fingerprint=FINGERPRINT, layout=LAYOUT, precision="int8")),
    ]
    for field, other in others:
        with pytest.raises(FingerprintMismatchError) as caught:
            merge(target, [other])
        assert caught.value.field == field


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_export_and_import_reproduce_the_bank(tmp_path: Path, precision):
    bank = open_bank(tmp_path / "bank", precision)
    bank.append([gradient(number) for number in range(70)])
    bank.append([replace(gradient(3), id="alias")])
    assert export(bank, tmp_path / "out") == 70
    again = import_export(tmp_path / "out", tmp_path / "again", precision=precision)
    assert dict(record_digests(again)) == dict(record_digests(bank))
    assert (len(again), again.manifest.fingerprint) == (71, FINGERPRINT)
    with pytest.raises(ConfigError, match="empty folder"):
        export(bank, tmp_path / "out")
    assert export(bank, tmp_path / "few", ["p1", "alias"]) == 2


def test_an_interrupted_export_is_repeated(tmp_path: Path):
    bank = open_bank(tmp_path / "bank")
    bank.append([gradient(number) for number in range(70)])
    with faults.handled_by(faults.Fault("file.written", "full")), pytest.raises(DiskFullError, match="export"):
        export(bank, tmp_path / "out")
    assert list((tmp_path / "out").iterdir())
    assert export(bank, tmp_path / "out") == 70
    assert dict(record_digests(import_export(tmp_path / "out", tmp_path / "again"))) == dict(record_digests(bank))


@pytest.fixture
def original(tmp_path: Path) -> tuple[Path, Path, dict[str, dict[str, torch.Tensor]]]:
    """Gradient file in the authors' format: two questions that share a passage."""
    name = "base_model.model.model.layers.8.mlp.gate_proj.lora_{}.default.weight"
    torch.manual_seed(0)

    def tensors() -> dict[str, torch.Tensor]:
        return {name.format("A"): torch.randn(4, 8) * 1e-4, name.format("B"): torch.randn(16, 4) * 1e-4}

    shared = tensors()
    stored = {"500_0": tensors(), "500_1": shared, "501_0": shared, "501_1": tensors()}
    torch.save(stored, tmp_path / "dev.pt")
    rows = [
        {"test_id": 500, "question": "Q", "answer": "a", "passages": ["one", "two"]},
        {"test_id": 501, "question": "R", "answer": "b", "passages": ["two", "three"]},
    ]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    return tmp_path / "dev.pt", tmp_path / "dev.json", stored


def test_import_of_original_gradients(original, tmp_path: Path):
    gradients, questions, stored = original
    bank = import_original(gradients, questions, tmp_path / "bank")
    assert (bank.stats()["ids"], bank.stats()["records"]) == (3, 3)
    rows = json.loads(questions.read_text())
    for row in rows:
        row["passage_ids"] = [f"d-{text}" for text in row["passages"]]
    questions.write_text(json.dumps(rows))
    named = import_original(gradients, questions, tmp_path / "named", fingerprint={"model": "m"})
    assert named.ids() == ["d-one", "d-three", "d-two"]
    for passage, name in (("d-one", "500_0"), ("d-two", "501_0"), ("d-three", "501_1")):
        for key, value in named.layout.split(named.get([passage])).items():
            assert torch.allclose(value[0], stored[name][key], rtol=0, atol=1e-7)
    assert verify(named).whole
    # an interrupted import is resumed
    assert import_original(gradients, questions, tmp_path / "named", fingerprint={"model": "m"}).stats()["records"] == 3


class Hostile:
    """Pickled code that runs on unsafe loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_code_is_not_executed(original, tmp_path: Path):
    _, questions, _ = original
    evil, mark = tmp_path / "evil.pt", tmp_path / "ran"
    evil.write_bytes(pickle.dumps({"500_0": Hostile(mark)}, protocol=2))
    torch.save({"500_0": {"x": torch.zeros(1)}, "note": Hostile(mark)}, tmp_path / "worse.pt")
    for path in (evil, tmp_path / "worse.pt"):
        with pytest.raises(DataError, match="not readable as tensors"):
            import_original(path, questions, tmp_path / "bank")
    assert not mark.exists()


def test_mismatching_questions_are_rejected(original, tmp_path: Path):
    gradients, questions, _ = original
    questions.write_text(json.dumps(json.loads(questions.read_text())[:1]))
    with pytest.raises(DataError, match="'501_0' \\(2 such\\)"):
        import_original(gradients, questions, tmp_path / "bank")
    questions.write_text("{}")
    with pytest.raises(DataError):
        import_original(gradients, questions, tmp_path / "bank")
    torch.save([1, 2], gradients)
    with pytest.raises(DataError, match="question_rank"):
        import_original(gradients, questions, tmp_path / "bank")
    assert Appended() == Appended(0, 0, 0, 0)
