"""Comparison of fingerprints when a bank is opened: case B8 of the specification."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from adapted_models import adapted_llama
from graftwork.grafting.precision import widen
from graftwork.methods.regrad.bank.errors import FingerprintMismatchError
from graftwork.methods.regrad.bank.files import ROUNDED, TYPE
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.encoding.fingerprint import earlier_base, fingerprint
from graftwork.methods.regrad.modules import adapters, layout
from tiny_models import word_tokenizer

CONFIG = ReGradConfig(rank=4, lora_alpha=8.0, layers="2-4", b_std=0.02)


@pytest.fixture
def bank(tmp_path):
    model = adapted_llama()
    found = fingerprint(model, word_tokenizer(), CONFIG)
    GradientBank.create(tmp_path / "bank", fingerprint=found, layout=layout(model)).close()
    return tmp_path / "bank"


def changed_adapter():
    model = adapted_llama()
    with torch.no_grad():
        next(iter(adapters(model).values())).lora_A[0, 0] += 1e-6
    return model


def changed_base():
    model = adapted_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    return model


def other_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["new"])
    return tokenizer


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("adapter", (changed_adapter, word_tokenizer, {})),
        ("base weights", (changed_base, word_tokenizer, {})),
        ("tokenizer", (adapted_llama, other_tokenizer, {})),
        ("document template", (adapted_llama, word_tokenizer, {"document_template": "{{ title }} {{ text }}"})),
        ("truncation length", (adapted_llama, word_tokenizer, {"max_document_tokens": 7})),
        ("adapter settings", (adapted_llama, word_tokenizer, {"lora_alpha": 16.0})),
    ],
)
def test_mismatch_names_the_entry(bank, field, changed):
    model, tokenizer, changes = changed
    now = fingerprint(model(), tokenizer(), dataclasses.replace(CONFIG, **changes))
    with pytest.raises(FingerprintMismatchError) as caught:
        GradientBank(bank, fingerprint=now)
    assert caught.value.field == field


def test_step_sizes_and_padding_state_are_not_compared(bank):
    model, tokenizer = adapted_llama(), word_tokenizer()
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.step_size_A.fill_(-3.0)
    tokenizer(["w4 w5", "w6"], padding=True, truncation=True, max_length=8)
    other = dataclasses.replace(CONFIG, step_size_mode="same", meta_order=1, initial_step_size=1.0)
    GradientBank(bank, fingerprint=fingerprint(model, tokenizer, other)).close()


def test_adapter_mismatch_is_reported_first(bank):
    now = fingerprint(changed_adapter(), other_tokenizer(), CONFIG)
    with pytest.raises(FingerprintMismatchError, match="adapter: found"):
        GradientBank(bank, fingerprint=now)


def saved_types(found: dict[str, str]) -> dict[str, str]:
    """Entries that a bank of an earlier version has."""
    return {name: value for name, value in found.items() if name not in (TYPE, ROUNDED)}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_bank_belongs_to_the_checkpoint_in_whatever_type_it_is_loaded(tmp_path, earlier):
    half = adapted_llama()
    for name, parameter in half.named_parameters():
        if not set(name.split(".")) & {"lora_A", "lora_B"}:
            parameter.data = parameter.data.bfloat16()
    wide, widened = copy.deepcopy(half).float(), copy.deepcopy(half)
    widen(widened)
    for number, made in enumerate((half, wide, widened)):
        found = fingerprint(made, word_tokenizer(), CONFIG)
        found = saved_types(found) if earlier else found
        GradientBank.create(tmp_path / str(number), fingerprint=found, layout=layout(made)).close()
        for model in (half, wide, widened):
            own = fingerprint(model, word_tokenizer(), CONFIG)
            GradientBank(tmp_path / str(number), fingerprint={**own, **earlier_base(model, found)}).close()
    with torch.no_grad():
        half.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    own = fingerprint(half, word_tokenizer(), CONFIG)
    with pytest.raises(FingerprintMismatchError, match="base weights"):
        GradientBank(tmp_path / "1", fingerprint={**own, **earlier_base(half, found)})


def test_a_change_below_the_precision_of_bfloat16_is_found_where_the_types_agree(bank):
    model = adapted_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] *= 1 + 1e-5
    with pytest.raises(FingerprintMismatchError, match="base weights"):
        GradientBank(bank, fingerprint=fingerprint(model, word_tokenizer(), CONFIG))
