"""Computation of adapters and per-row updates: cases M1–M6 of the specification."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers

from adapted_models import adapted_llama, flat, padded, passages, plain_copy, random_llama, relative, theta_of
from graftwork.errors import ConfigError, DataError, UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.methods.regrad import ReGrad, functional, reference
from graftwork.methods.regrad.encoding import gradients as gradients_module
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.modules import (
    LowRankAdapter,
    adapter_off,
    adapters,
    flat_adapter,
    layout,
    step_sizes,
    updated,
)

IDS = torch.stack(passages(4, shortest=12, longest=12, seed=3))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def one_by_one(model, rows):
    """Gradient of each passage by the definition, on merged weights."""
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    return torch.stack(
        [
            flat(
                model,
                reference.inner_gradient(
                    theta, lambda t, row=row: reference.text_loss(dense, t, scaling, row), keep_graph=False
                ),
            )
            for row in rows
        ]
    )


def test_fresh_adapter_equals_the_pretrained_model_and_only_b_has_gradients():
    dense, model = random_llama(), adapted_llama(b_std=0.0)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-6)
    gradients, _ = passage_gradients(model, *padded(passages(3)))
    for name, part in layout(model).split(gradients).items():
        assert (part == 0).all() if name.endswith("lora_A") else all((row != 0).any() for row in part), name


def test_layout_of_the_tiny_model_matches_the_specification():
    model = adapted_llama()
    assert layout(model).size == 8496 == flat_adapter(model).numel() == step_sizes(model).numel()
    assert len(layout(model).tensors) == 18


@pytest.mark.parametrize("padding", [0, 100])
def test_batched_gradients_equal_the_definition(padding):
    model, rows = adapted_llama(), passages(6)
    gradients, losses = passage_gradients(model, *padded(rows, padding))
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    for row, found, expected in zip(rows, gradients, one_by_one(model, rows), strict=True):
        assert relative(found, expected) < 1e-5
        assert float(losses[len(losses) - 1]) > 0
        assert row.ndim == 1
    expected_losses = torch.stack([reference.text_loss(dense, theta, scaling, row) for row in rows])
    torch.testing.assert_close(losses, expected_losses.detach(), rtol=1e-5, atol=1e-6)


def test_batched_gradients_equal_vmap():
    model, rows = adapted_llama(), passages(4, shortest=20, longest=20)
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    values = {name: tensor.detach() for name, tensor in theta.items()}
    mapped = torch.func.vmap(
        torch.func.grad(lambda t, row: reference.text_loss(dense, t, scaling, row)), in_dims=(None, 0)
    )(values, torch.stack(rows))
    expected = torch.cat([mapped[name].flatten(1) for name, _ in layout(model).tensors], dim=1)
    found, _ = passage_gradients(model, *padded(rows))
    assert max(relative(row, other) for row, other in zip(found, expected, strict=True)) < 1e-5


def test_gradients_do_not_change_the_model():
    model = adapted_llama().train()
    before, learned = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    passage_gradients(model, *padded(passages(2)))
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == learned
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_below_the_lowest_adapted_layer_is_differentiated():
    model, seen = adapted_llama(), []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, inputs, output, n=number: seen.append(n) if output[0].requires_grad else None
        )
    passage_gradients(model, *padded(passages(2)))
    # the attention of layer 2 comes before its adapted projections
    assert seen == [3, 4]


@pytest.mark.parametrize("length", [0, 1])
def test_passage_below_two_tokens_is_rejected(length):
    ids, mask = padded([*passages(2), torch.full((length,), 5)])
    with pytest.raises(DataError, match=rf"passage of {length} tokens in row 2.*at least 2"):
        passage_gradients(adapted_llama(), ids, mask)


def test_strength_zero_equals_the_adapter_not_the_pretrained_model():
    model = adapted_llama(b_std=0.5)
    dense = plain_copy(model)
    gradients, _ = passage_gradients(model, IDS, torch.ones_like(IDS))
    at_zero = functional.update(step_sizes(model), gradients, 0.0)
    with updated(model, at_zero):
        torch.testing.assert_close(logits(model), logits(model), rtol=0, atol=0)
        found = logits(model)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-6)
    assert (found - logits(dense)).abs().max() > 1e-2
    with adapter_off(model):
        assert torch.equal(logits(model), logits(dense))
    with updated(model, at_zero, off=torch.tensor([True, False, True, False])):
        mixed = logits(model)
    torch.testing.assert_close(mixed[::2], logits(dense)[::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1::2], found[1::2], rtol=0, atol=1e-6)


def test_an_update_is_linear_in_passages_and_strength():
    model = adapted_llama()
    gradients, _ = passage_gradients(model, *padded(passages(2)))
    sizes = torch.randn(layout(model).size, generator=torch.Generator().manual_seed(4))
    first, second = (functional.update(sizes, row[None]) for row in gradients)
    together = functional.update(sizes, (2 * gradients[0] - 0.5 * gradients[1])[None])
    assert relative(together, 2 * first - 0.5 * second) < 1e-6
    strengths = torch.tensor([0.0, 1.0, -2.0])
    rows = functional.update(sizes, gradients[:1].expand(3, -1), strengths)
    torch.testing.assert_close(rows, strengths[:, None] * first)
    assert not functional.update(sizes, torch.zeros(1, sizes.numel())).any()


def test_all_gradients_are_taken_at_the_same_parameters():
    model, rows = adapted_llama(), passages(2)
    theta, scaling, dense = theta_of(model), next(iter(adapters(model).values())).scaling, plain_copy(model)
    losses = [lambda t, row=row: reference.text_loss(dense, t, scaling, row) for row in rows]
    # a large step, so that the parameters at which a gradient is taken matter
    alpha = {name: torch.full_like(tensor, 0.5) for name, tensor in theta.items()}
    stepped = reference.stepped(theta, alpha, losses)
    expected = flat(model, stepped) - flat(model, theta)
    gradients, _ = passage_gradients(model, *padded(rows))
    found = functional.update(torch.full((8496,), 0.5), gradients.sum(0, keepdim=True))[0]
    assert relative(found, expected.detach()) < 1e-4
    after_one = {
        name: tensor.detach().requires_grad_() for name, tensor in reference.stepped(theta, alpha, losses[:1]).items()
    }
    one_after_the_other = flat(model, reference.stepped(after_one, alpha, losses[1:])) - flat(model, theta)
    assert relative(found, one_after_the_other.detach()) > 1e-2
    assert relative(found, expected.detach() / 2) > 0.5


def test_per_row_updates_equal_the_definition():
    model = adapted_llama(b_std=0.3)
    delta = 0.05 * torch.randn(4, 8496, generator=torch.Generator().manual_seed(5))
    delta[2] = 0
    with updated(model, delta):
        found = logits(model)
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    for number, row in enumerate(IDS):
        parts = layout(model).split(delta[number])
        moved = {name: tensor.detach() + parts[name] for name, tensor in theta.items()}
        weights = reference.merged(dense, moved, scaling)
        with torch.no_grad():
            expected = torch.func.functional_call(dense, weights, (row[None],)).logits[0]
        torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)


def test_generation_uses_per_row_updates_at_every_step():
    model = adapted_llama(b_std=0.3)
    delta = 0.3 * torch.randn(4, 8496, generator=torch.Generator().manual_seed(6))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with updated(model, delta):
        together = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
        beams = model.generate(IDS, attention_mask=torch.ones_like(IDS), num_beams=2, **options)
    for number, row in enumerate(IDS):
        mask = torch.ones_like(row)[None]
        with updated(model, delta[number : number + 1]):
            assert torch.equal(model.generate(row[None], attention_mask=mask, **options)[0], together[number])
            alone = model.generate(row[None], attention_mask=mask, num_beams=2, **options)[0]
            assert torch.equal(alone, beams[number])
            uncached = row[None]
            for _ in range(8):
                following = logits(model, uncached)[:, -1]
                following[:, 2] = -torch.inf  # no end before min_new_tokens
                uncached = torch.cat([uncached, following.argmax(-1, keepdim=True)], dim=1)
            assert torch.equal(uncached[0], together[number])
    assert not torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options), together)


def test_updates_are_isolated_between_threads():
    model = adapted_llama(b_std=0.3)
    generator = torch.Generator().manual_seed(7)
    deltas = [0.2 * torch.randn(4, 8496, generator=generator) for _ in range(3)]
    expected = []
    for delta in deltas:
        with updated(model, delta):
            expected.append(logits(model))
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def work(number):
        for _ in range(5):
            barrier.wait()
            with updated(model, deltas[number]):
                barrier.wait()
                if not torch.equal(logits(model), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_updates_of_the_wrong_size_are_rejected():
    model = adapted_llama()
    with pytest.raises(ConfigError, match=r"shape \[2, 5\]; expected \[rows, 8496\]"), updated(model, torch.ones(2, 5)):
        pass
    with pytest.raises(ConfigError, match="updates for 3 rows"), updated(model, torch.zeros(3, 8496)):
        logits(model)
    with pytest.raises(ConfigError, match="without adapters"):
        adapters(random_llama())


def test_step_size_modes_start_equal_and_differ_in_parameter_count():
    counts, first = {"tie": 18, "same": 1, "full": 8496, "fix": 0}, None
    for mode, count in counts.items():
        model = adapted_llama(settings={"step_size_mode": mode, "initial_step_size": 0.01})
        learned = [p for a in adapters(model).values() for name, p in a.named_parameters() if "step" in name]
        assert sum(parameter.numel() for parameter in learned) == count
        gradients, _ = passage_gradients(model, *padded(passages(2)))
        moved = flat_adapter(model) + functional.update(step_sizes(model), gradients.sum(0, keepdim=True))[0]
        first = moved if first is None else first
        assert torch.equal(moved, first)


@pytest.mark.parametrize(("mode", "count"), [("tie", 48), ("same", 1), ("fix", 0)])
def test_parameter_counts_of_the_published_1b_model(mode, count):
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64,
        head_dim=64,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    converted = convert(model, ReGrad(rank=16, step_size_mode=mode))
    assert len(converted.changes) == 24
    assert layout(converted.model).size == 3_932_160
    names = [name for a in adapters(model).values() for name, _ in a.named_parameters()]
    assert sum("step" in name for name in names) == count
    assert {change.path.split(".")[2] for change in converted.changes} == {str(number) for number in range(8, 16)}


def test_positive_step_sizes_start_at_the_initial_value_and_stay_positive():
    model = adapted_llama(settings={"step_size_sign": "positive", "initial_step_size": 0.05})
    torch.testing.assert_close(step_sizes(model).detach(), torch.full((8496,), 0.05))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "step_size" in name:
                parameter.sub_(50)
    assert (step_sizes(model) > 0).all()
    with pytest.raises(ConfigError, match="starts above 0"):
        ReGrad(step_size_sign="positive", initial_step_size=-1.0)


def test_adapter_stays_in_float32_when_the_model_is_cast():
    model = adapted_llama()
    before = flat_adapter(model).detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(flat_adapter(model).detach(), before)
    assert model.lm_head.weight.dtype == torch.bfloat16
    gradients, losses = passage_gradients(model, *padded(passages(2)))
    assert gradients.dtype == losses.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), updated(model, torch.full((4, 8496), 1e-5)):
        slightly = logits(model)
    assert torch.isfinite(slightly).all()
    assert model.to(torch.float64).lm_head.weight.dtype == flat_adapter(model).dtype == torch.float64


def test_restore_removes_adapters_and_a_second_conversion_replaces_them():
    model = random_llama()
    dense = logits(model)
    convert(model, ReGrad(rank=4, b_std=0.5))
    convert(model, ReGrad(rank=2, b_std=0.5, layers="4"))
    assert [adapter.lora_A.shape[0] for adapter in adapters(model).values()] == [2, 2, 2]
    restore(model)
    assert torch.equal(logits(model), dense)
    assert not any(isinstance(module, LowRankAdapter) for module in model.modules())


@pytest.mark.parametrize("layers", ["7", "4-5"])
def test_missing_layers_are_rejected(layers):
    model = random_llama()
    with pytest.raises(UnsupportedModelError, match=r"5 layers.*Nothing was changed"):
        convert(model, ReGrad(layers=layers))
    assert not any(isinstance(module, LowRankAdapter) for module in model.modules())


def test_logits_in_parts_give_the_gradients_of_all_at_once(monkeypatch):
    model, (ids, mask) = adapted_llama(), padded(passages(4))
    whole, whole_losses = functional_gradients(model, ids, mask, monkeypatch, plain=False)
    monkeypatch.setattr(gradients_module, "FEWEST_TOKENS", 7)
    monkeypatch.setattr(gradients_module, "LOGIT_BYTES", {"cpu": 0})
    parts, losses = functional_gradients(model, ids, mask, monkeypatch, plain=True)
    assert max(relative(row, other) for row, other in zip(parts, whole, strict=True)) < 1e-6
    torch.testing.assert_close(losses, whole_losses, rtol=1e-6, atol=1e-7)


def functional_gradients(model, ids, mask, monkeypatch, *, plain: bool):
    monkeypatch.setattr(gradients_module, "_has_plain_head", lambda *_: plain)
    return passage_gradients(model, ids, mask)


def test_models_that_cap_their_logits_keep_the_cap():
    """Gemma 2 changes the logits after its output layer; leaving the layer out would lose that."""
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = convert(transformers.Gemma2ForCausalLM(config).eval(), ReGrad(rank=2, b_std=0.02)).model
    rows = passages(2)
    found, losses = passage_gradients(model, *padded([row % 64 for row in rows]))
    for row, gradient, loss in zip(rows, found, losses, strict=True):
        anchor = [part for each in adapters(model).values() for part in (each.lora_A, each.lora_B)]
        logit = model(input_ids=row[None] % 64).logits[0]
        expected = torch.nn.functional.cross_entropy(logit[:-1], row[1:] % 64)
        parts = torch.autograd.grad(expected, anchor)
        assert relative(gradient, torch.cat([part.flatten() for part in parts])) < 1e-5
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
