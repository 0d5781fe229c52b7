"""Drift check: answering changes no weight, and a changed weight is detected."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from graftwork.cli.app import run
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.grafting.converted import save
from graftwork.methods.regrad.answering.drift import check_drift
from graftwork.methods.regrad.answering.in_place import InPlaceUpdater
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import encode_passages
from graftwork.methods.regrad.modules import adapters
from graftwork.settings.recipe import RunConfig, write_run
from regrad_engine import adapted_decoder, encoder_of, passages


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Run folder with a bank of twelve passages."""
    folder = tmp_path_factory.mktemp("drift")
    converted = adapted_decoder()
    save(converted, folder / "run")
    write_run(folder / "run" / "run.yaml", RunConfig(model=shipped_model("decoder")))
    encoder = encoder_of(converted)
    encode_passages(encoder, encoder.open_bank(folder / "bank"), passages(converted, 12))
    return folder


def words(place, count):
    return ["doctor", str(place / "run"), "--drift", str(count), "--set", f"method.bank={place / 'bank'}", "--json"]


def test_200_questions_in_each_mode_change_no_weight(place, capsys, caplog):
    assert run(words(place, 200)) == 0
    findings = {entry["check"]: entry for entry in json.loads(capsys.readouterr().out)}
    found = findings["drift/regrad"]
    assert found["state"] == "ok"
    answered, failed, cancelled = (int(word) for word in found["found"].split() if word.isdigit())
    assert answered + failed + cancelled == 400
    assert min(failed, cancelled) > 10
    # the path of a bank is no difference of settings worth a warning
    assert "other settings" not in caplog.text


@pytest.mark.parametrize("in_place", [False, True], ids=["rows", "in place"])
def test_a_changed_weight_is_detected(place, monkeypatch, in_place):
    converted = adapted_decoder()
    weight = next(iter(adapters(converted.model).values())).lora_B

    def nudge():
        with torch.no_grad():
            weight.view(-1)[0] += 1.0

    if in_place:
        monkeypatch.setattr(InPlaceUpdater, "_restore", lambda self: None)
    else:
        converted.model.register_forward_pre_hook(lambda *arguments: nudge())
    with GradientBank(place / "bank") as bank:
        found = check_drift(converted.model, converted.tokenizer, converted.methods[-1].config, bank, 20)
    assert not found.same
    assert "CHANGED" in str(found)


@contextmanager
def empty(place):
    bank = encoder_of(adapted_decoder()).open_bank(place / "empty")
    with bank:
        yield bank


def test_drift_check_without_passages_or_bank_raises(place, capsys):
    converted = adapted_decoder()
    with empty(place) as bank, pytest.raises(ConfigError, match="Found 0 passages"):
        check_drift(converted.model, converted.tokenizer, converted.methods[-1].config, bank, 5)
    assert run(["doctor", "--drift", "5"]) == 2
    assert "Give the folder of a run" in capsys.readouterr().err
    assert run(["doctor", str(place / "run"), "--drift", "5"]) == 2
    assert "--set method.bank=FOLDER" in capsys.readouterr().err
