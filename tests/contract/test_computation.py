"""Forward, backward and generation of converted models."""

import pytest
import torch

from graftwork.grafting.conversion import convert
from graftwork.surgery.modules import GRAFT
from tiny_models import (
    PAD,
    VOCABULARY,
    assert_same,
    gradients,
    is_learned,
    loss_and_gradients,
    real_logits,
    real_positions,
)


def test_identity_settings_give_the_logits_and_gradients_of_the_dense_model(case):
    model, batch = case.model(), case.batch()
    dense, (loss, expected) = real_logits(model, case.name, batch), loss_and_gradients(model, batch)
    convert(model, case.identity())
    torch.testing.assert_close(real_logits(model, case.name, batch), dense, rtol=1e-9, atol=1e-9)
    found_loss, found = loss_and_gradients(model, batch)
    torch.testing.assert_close(found_loss, loss, rtol=1e-9, atol=1e-9)
    assert_same({name: value for name, value in found.items() if not is_learned(name)}, expected)


def test_padding_tokens_do_not_influence_real_tokens(case):
    model, batch = case.converted(), case.batch()
    other = dict(batch)
    other["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), 9)
    if case.tiny.kind == "both":
        # labels are shifted into decoder inputs, where -100 becomes padding after the real tokens
        other["labels"] = batch["labels"]
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    torch.testing.assert_close(
        real_logits(model, case.name, other), real_logits(model, case.name, batch), rtol=1e-12, atol=1e-12
    )


def test_the_padding_mask_changes_the_logits(case):
    model, batch = case.converted(), case.batch()
    blind = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    with torch.no_grad():
        difference = (model(**blind).logits - model(**batch).logits)[real_positions(case.name, batch)].abs().max()
    assert difference > 1e-3


@pytest.mark.only("decoder", "both")
def test_future_tokens_do_not_influence_past_tokens(case):
    model = case.converted()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % VOCABULARY
    word = "decoder_input_ids" if case.tiny.kind == "both" else "input_ids"
    fixed = {"input_ids": ids} if case.tiny.kind == "both" else {}
    with torch.no_grad():
        first, second = (model(**{**fixed, word: tokens}).logits for tokens in (ids, changed))
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=1e-12, atol=1e-12)
    assert (first[:, 5:] - second[:, 5:]).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing_under_dropout(case):
    model, batch = case.converted(), case.batch()
    evaluated, _ = loss_and_gradients(model, batch)
    model.train()
    torch.manual_seed(3)
    loss, expected = loss_and_gradients(model, batch)
    # recurrent mixers drop out no weights, and tiny decoders have no other dropout
    assert torch.equal(loss, evaluated) == (case.method_class.name == "cald" and case.tiny.kind == "decoder")
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    again, found = loss_and_gradients(model, batch)
    assert model.is_activation_checkpointing
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    assert_same(found, expected, tolerance=1e-12)


def test_reentrant_checkpointing_gives_the_same_gradients_under_dropout(case):
    model, batch = case.converted().train(), case.batch()
    torch.manual_seed(3)
    loss, expected = loss_and_gradients(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again, found = loss_and_gradients(model, batch)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    assert_same(found, expected, tolerance=1e-12)


def hidden_tensors(value):
    """Tensors inside a value that is no tensor, list or dictionary itself."""
    if isinstance(value, torch.Tensor) or value is None:
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from hidden_tensors(item)
        return
    names = [*getattr(value, "__dict__", {}), *getattr(value, "__slots__", ())]
    for part in (getattr(value, name) for name in names):
        if isinstance(part, torch.Tensor):
            yield part


@pytest.mark.parametrize("layers", [None, "1"])
def test_layers_exchange_tensors_with_gradients_as_tensors_only(case, layers):
    """Re-entrant checkpointing, device moves, and distributed wrappers ignore tensors inside other objects."""
    model, batch = case.model().train(), case.batch()
    settings = case.settings.real(case.tiny)
    if layers is not None and "layers" not in case.method_class.config_class.__dataclass_fields__:
        pytest.skip("changes all layers")
    convert(model, case.method_class(**settings, **({} if layers is None else {"layers": layers})))
    seen = []

    def look(module, args, kwargs):
        for value in (*args, *kwargs.values()):
            seen.extend(tensor for tensor in hidden_tensors(value) if tensor.requires_grad)

    for path, module in model.named_modules():
        # a graft runs inside its layer and gets the bias as an object
        if GRAFT not in path.split("."):
            module.register_forward_pre_hook(look, with_kwargs=True)
    model(**batch)
    assert not seen


def test_two_forward_passes_before_one_backward_pass_give_both_gradients(case):
    model, first, second = case.converted().train(), case.batch(1), case.batch(2)
    torch.manual_seed(3)
    model.zero_grad()
    for batch in (first, second):
        model(**batch).loss.backward()
    expected = gradients(model)
    torch.manual_seed(3)
    _, found = loss_and_gradients(model, first, second)
    assert_same(found, expected, tolerance=1e-12)


def test_bfloat16_models_stay_bfloat16(case):
    model, batch = case.model(dtype=torch.bfloat16), case.batch()
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    convert(model, case.real()).model.train()
    loss, found = loss_and_gradients(model, batch)
    assert torch.isfinite(loss)
    after = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in types} == types
    # learned parameters may have a higher precision than the model
    assert {after[name] for name in after.keys() - types.keys()} <= {torch.bfloat16, torch.float32}
    assert all(gradient.dtype == after[name] and gradient.isfinite().all() for name, gradient in found.items())
    assert real_logits(model.eval(), case.name, batch).dtype == torch.bfloat16


def prompt(case):
    batch = case.batch()
    batch.pop("labels")
    return batch


def greedy(model, batch, **options):
    return model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=PAD, **options)


@pytest.mark.only("decoder", "both")
def test_cached_generation_equals_uncached_generation(case):
    model, batch = case.converted(), prompt(case)
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (greedy(model, batch, use_cache=use_cache, **outputs) for use_cache in (True, False))
    assert cached.past_key_values is not None
    assert uncached.past_key_values is None
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.only("decoder", "both")
def test_identity_settings_generate_the_tokens_of_eager_attention(case):
    model, batch = case.model(attention="eager", dtype=torch.float32), prompt(case)
    expected = greedy(model, batch)
    convert(model, case.identity())
    assert torch.equal(greedy(model, batch), expected)


@pytest.mark.only("decoder")
def test_generation_does_not_depend_on_padding(case):
    model, batch = case.converted(), prompt(case)
    together = greedy(model, batch)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], together, strict=True):
        alone = greedy(model, {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]})
        assert torch.equal(alone[0, -8:], row[-8:])
