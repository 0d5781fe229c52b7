"""Conversion changes the listed modules only, and restore undoes it exactly."""

import copy
import pickle

import pytest
import torch

from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import save
from graftwork.pipeline.loading import load
from graftwork.surgery.modules import undo_steps
from tiny_models import anatomy, is_learned, loss_and_gradients, real_logits, word_tokenizer


def test_the_number_of_changes_matches_the_layers(case):
    converted = convert(case.model(), case.real())
    assert len(converted.changes) == case.settings.changes(case.tiny)
    assert len({change.path for change in converted.changes}) == len(converted.changes)
    names = {name for name, _ in converted.model.named_modules()}
    assert {change.path for change in converted.changes} <= names


def test_unchanged_modules_are_the_same_objects(case):
    model = case.model()
    before = dict(model.named_modules())
    changed = {change.path for change in convert(model, case.real()).changes}
    after = dict(model.named_modules())
    assert before.keys() <= after.keys()
    assert {path for path in before if after[path] is not before[path]} <= changed


def test_parameters_keep_their_identity_and_names(case):
    model = case.model()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    convert(model, case.real())
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    # learned parameters are in child modules of the method
    assert all(is_learned(name) for name in after.keys() - parameters.keys())
    assert [key for key in model.state_dict() if not is_learned(key)] == keys


@pytest.mark.changes_model
def test_real_settings_change_the_logits(case):
    model, batch = case.model(), case.batch()
    dense = real_logits(model, case.name, batch)
    convert(model, case.real())
    assert (real_logits(model, case.name, batch) - dense).abs().max() > 1e-3


def test_restore_is_exact_bit_for_bit(case):
    model, batch = case.model(), case.batch()
    model.train()
    inner = dict(model.named_modules())
    configs = {path: module.config for path, module in inner.items() if hasattr(module, "config")}
    before = anatomy(model), {path: set(module.__dict__) for path, module in inner.items()}
    implementations = {path: config._attn_implementation for path, config in configs.items()}
    logits = real_logits(model.eval(), case.name, batch)
    convert(model, case.real()).model.train()
    assert restore(model) >= case.settings.changes(case.tiny)
    assert (anatomy(model), {path: set(module.__dict__) for path, module in model.named_modules()}) == before
    assert {path: config._attn_implementation for path, config in configs.items()} == implementations
    assert torch.equal(real_logits(model.eval(), case.name, batch), logits)
    assert not undo_steps(model)


def test_a_saved_and_loaded_model_has_the_same_logits(case, tmp_path):
    batch = case.batch()
    converted = convert(case.model(dtype=torch.float32), case.real(), tokenizer=word_tokenizer())
    expected = real_logits(converted.model, case.name, batch)
    save(converted, tmp_path / "run")
    loaded = load(tmp_path / "run", strict=True)
    assert loaded.methods[0].config == converted.methods[0].config
    assert loaded.changes == converted.changes
    assert torch.equal(real_logits(loaded.model, case.name, batch), expected)


def test_a_loaded_model_can_be_converted_again_and_restored(case, tmp_path):
    batch, model = case.batch(), case.model(dtype=torch.float32)
    dense = real_logits(model, case.name, batch)
    save(convert(model, case.real(), tokenizer=word_tokenizer()), tmp_path / "run")
    loaded = convert(load(tmp_path / "run"), case.identity())
    assert len(loaded.methods) == 1
    assert len(loaded.changes) == case.settings.changes(case.tiny)
    torch.testing.assert_close(real_logits(loaded.model, case.name, batch), dense, rtol=1e-4, atol=1e-4)
    restore(loaded)
    torch.testing.assert_close(real_logits(loaded.model, case.name, batch), dense, rtol=1e-4, atol=1e-4)
    assert not undo_steps(loaded.model)


def test_conversion_is_idempotent(case):
    model, batch = case.model(), case.batch()
    once = convert(model, case.real())
    logits, steps, tree = real_logits(model, case.name, batch), len(undo_steps(model)), [*model.state_dict()]
    twice = convert(once, case.real())
    assert twice.changes == once.changes
    assert len(undo_steps(model)) == steps
    assert [*model.state_dict()] == tree
    assert torch.equal(real_logits(model, case.name, batch), logits)


def test_conversion_with_other_settings_replaces_the_first(case):
    model, batch = case.model(), case.batch()
    dense = real_logits(model, case.name, batch)
    converted = convert(convert(model, case.real()), case.identity())
    assert [method.config for method in converted.methods] == [case.identity().config]
    torch.testing.assert_close(real_logits(model, case.name, batch), dense, rtol=1e-9, atol=1e-9)
    restore(model)
    assert torch.equal(real_logits(model, case.name, batch), dense)


def test_two_conversions_in_one_process_are_independent(case):
    first, second, batch = case.model(), case.model(seed=5), case.batch()
    dense = real_logits(second, case.name, batch)
    convert(first, case.real())
    expected = real_logits(first, case.name, batch)
    assert torch.equal(real_logits(second, case.name, batch), dense)
    convert(second, case.identity())
    assert torch.equal(real_logits(first, case.name, batch), expected)
    restore(second)
    assert torch.equal(real_logits(first, case.name, batch), expected)
    assert torch.equal(real_logits(second, case.name, batch), dense)


def check_independent(copied, original, case):
    """Train and restore a copy, and check that the original is unchanged."""
    batch = case.batch()
    expected = real_logits(original, case.name, batch)
    assert torch.equal(real_logits(copied, case.name, batch), expected)
    copied.train()
    loss_and_gradients(copied, batch)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    copied.eval()
    assert not torch.equal(real_logits(copied, case.name, batch), expected)
    assert restore(copied) > 0
    assert undo_steps(original)
    assert not original.training
    assert all(parameter.grad is None for parameter in original.parameters())
    assert torch.equal(real_logits(original, case.name, batch), expected)


@pytest.mark.changes_model
def test_a_deep_copy_is_independent_of_its_original(case):
    original = case.converted()
    check_independent(copy.deepcopy(original), original, case)


@pytest.mark.changes_model
def test_a_pickled_model_is_independent_of_its_original(case):
    original = case.converted()
    check_independent(pickle.loads(pickle.dumps(original)), original, case)
