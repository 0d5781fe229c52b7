"""Meta-gradients against the reference, finite differences and each other: cases M7–M10, and L6."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapted_models import adapted_llama, flat, padded, passages, plain_copy, random_llama, relative, theta_of
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.regrad import ReGrad, reference
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.functional import IGNORED_LABEL
from graftwork.methods.regrad.meta_training.learning import meta_gradients
from graftwork.methods.regrad.modules import adapters, flat_adapter, layout, step_sizes, updated
from graftwork.methods.regrad.phases import Meta

ANSWER = 3


def episodes(count: int, each: int, *, vocabulary: int = 128, seed: int = 1) -> dict[str, torch.Tensor]:
    """Batch of random questions with random passages, in the format of `EpisodeCollator`."""
    documents, owners = padded(passages(count * each, vocabulary=vocabulary, seed=seed)), []
    for number in range(count):
        owners += [number] * each
    ids, mask = padded(passages(count, shortest=8, longest=20, vocabulary=vocabulary, seed=seed + 50))
    ends = mask.sum(-1, keepdim=True)
    position = torch.arange(ids.shape[1])
    labels = ids.where((position >= ends - ANSWER) & (position < ends), IGNORED_LABEL)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "document_ids": documents[0],
        "document_mask": documents[1],
        "document_task": torch.tensor(owners),
    }


def by_definition(model, batch):
    """Loss, gradients of θ and gradients of α by the reference, one question after the other, as flat vectors."""
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    split = layout(model).split(step_sizes(model).detach())
    alpha = {name: tensor.clone().requires_grad_() for name, tensor in split.items()}
    losses, of_theta, of_alpha = [], [], []
    for number in range(len(batch["input_ids"])):
        rows = [
            ids[mask.bool()]
            for ids, mask, owner in zip(
                batch["document_ids"], batch["document_mask"], batch["document_task"], strict=True
            )
            if owner == number
        ]
        documents = [lambda t, row=row: reference.text_loss(dense, t, scaling, row) for row in rows]
        question = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        first = len(question) - ANSWER
        loss, theta_gradient, alpha_gradient = reference.outer_gradients(
            theta, alpha, documents, lambda t, q=question, f=first: reference.text_loss(dense, t, scaling, q, f)
        )
        losses.append(loss.detach())
        of_theta.append(flat(model, theta_gradient))
        of_alpha.append(flat(model, alpha_gradient))
    return torch.stack(losses).mean(), torch.stack(of_theta).mean(0), torch.stack(of_alpha).mean(0)


def test_reference_gradients_equal_central_differences_in_float64():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    data = torch.randn(3, 7, 5, dtype=torch.float64), torch.randint(0, 4, (3, 7))
    theta = {
        "lora_A": torch.randn(2, 5, dtype=torch.float64).requires_grad_(),
        "lora_B": torch.randn(6, 2, dtype=torch.float64).requires_grad_(),
    }
    alpha = {name: torch.full_like(tensor, 0.3).requires_grad_() for name, tensor in theta.items()}

    def loss(number):
        def compute(t):
            hidden = torch.tanh(first(data[0][number]) + data[0][number] @ t["lora_A"].mT @ t["lora_B"].mT)
            return nn.functional.cross_entropy(second(hidden), data[1][number])

        return compute

    documents, question = [loss(0), loss(1)], loss(2)
    _, of_theta, of_alpha = reference.outer_gradients(theta, alpha, documents, question)
    for values, gradients in ((theta, of_theta), (alpha, of_alpha)):
        for name, gradient in gradients.items():
            for index in range(0, gradient.numel(), 3):
                outcomes = []
                for sign in (1, -1):
                    moved = {key: tensor.detach().clone() for key, tensor in values.items()}
                    moved[name].view(-1)[index] += sign * 1e-5
                    moved = {key: tensor.requires_grad_() for key, tensor in moved.items()}
                    pair = (moved, alpha) if values is theta else (theta, moved)
                    outcomes.append(question(reference.stepped(*pair, documents)).item())
                found = (outcomes[0] - outcomes[1]) / 2e-5
                assert found == pytest.approx(gradient.view(-1)[index].item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mode", ["tie", "full"])
def test_batched_meta_gradients_equal_the_reference(mode):
    settings = {"layers": "2-3", "step_size_mode": mode, "initial_step_size": 0.5}
    model, batch = adapted_llama(layers=4, settings=settings, dtype=torch.float64).double(), episodes(3, 2)
    loss, of_theta, of_alpha = by_definition(model, batch)
    found = meta_gradients(model, batch)
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative(found.adapter, of_theta) < 1e-5
    assert relative(found.step_sizes, of_alpha) < 1e-5


def test_phase_step_accumulates_the_meta_gradients():
    model, batch = adapted_llama(settings={"initial_step_size": 0.5}), episodes(2, 3)
    found = meta_gradients(model, batch)
    values = Meta(ReGradConfig()).step(model, batch)
    assert values["loss"].item() == pytest.approx(found.loss.item())
    values["loss"].backward()
    parts, sizes = layout(model).split(found.adapter), layout(model).split(found.step_sizes)
    for path, adapter in adapters(model).items():
        for name in ("lora_A", "lora_B"):
            torch.testing.assert_close(getattr(adapter, name).grad, parts[f"{path}.{name}"])
            size = getattr(adapter, f"step_size_{name[-1]}").grad
            torch.testing.assert_close(size, sizes[f"{path}.{name}"].sum(), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "graftwork" not in name)


def steep_llama(seed):
    """Model of case M8: step sizes 1, 2, 3 by tensor."""
    model = random_llama(layers=4, intermediate=160, std=0.1, dtype=torch.float64, seed=seed)
    convert(model, ReGrad(rank=4, lora_alpha=8.0, layers="2-3", b_std=0.02, seed=seed)).model.double()
    sizes = (a.get_parameter(name) for a in adapters(model).values() for name in ("step_size_A", "step_size_B"))
    with torch.no_grad():
        for number, size in enumerate(sizes):
            size.fill_(1.0 + number % 3)
    return model


def test_logged_gradient_norm_and_update_ratio_equal_their_definitions():
    settings = {"step_size_mode": "tie", "initial_step_size": 0.5}
    model, batch = adapted_llama(settings=settings, dtype=torch.float64).double(), episodes(3, 2)
    with torch.no_grad():
        for number, adapter in enumerate(adapters(model).values()):
            adapter.get_parameter("step_size_A").fill_(0.2 + number)
    rows, _ = passage_gradients(model, batch["document_ids"], batch["document_mask"])
    theta = flat_adapter(model).detach()
    alpha = step_sizes(model).detach()
    gradient_norms, ratios = [], []
    for question in range(3):
        summed = rows[batch["document_task"] == question].double().sum(0)
        gradient_norms.append(summed.square().sum().sqrt().item())
        ratios.append(((alpha * summed).square().sum().sqrt() / theta.square().sum().sqrt()).item())
    for order in (1, 2):
        found = meta_gradients(model, batch, order=order)
        assert found.gradient_norm.item() == pytest.approx(sum(gradient_norms) / 3, rel=1e-5)
        assert found.update_ratio.item() == pytest.approx(sum(ratios) / 3, rel=1e-5)
    # the questions differ, so that the mean differs from other aggregates
    assert max(ratios) > 1.01 * min(ratios)
    assert Meta(ReGradConfig()).step(model, batch)["update_ratio"].item() == pytest.approx(sum(ratios) / 3, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_second_order_gradient_equals_the_slope_of_the_loss_and_first_order_does_not(seed):
    model, batch = steep_llama(seed), episodes(1, 3, seed=10 + seed)
    second, first = meta_gradients(model, batch), meta_gradients(model, batch, order=1)
    direction = second.adapter / second.adapter.norm()
    theta, ends = flat_adapter(model).detach().clone(), []
    for sign in (1, -1):
        for name, part in layout(model).split(theta + sign * 0.01 * direction).items():
            with torch.no_grad():
                model.get_submodule(name.rpartition(".")[0]).graftwork_adapter.get_parameter(name[-6:]).copy_(part)
        ends.append(meta_gradients(model, batch, order=1).loss.item())
    slope = (ends[0] - ends[1]) / 0.02
    assert slope == pytest.approx((second.adapter @ direction).item(), rel=1e-2)
    assert relative(first.adapter, second.adapter) > 0.4
    torch.testing.assert_close(first.step_sizes, second.step_sizes, rtol=1e-6, atol=1e-9)


def test_gradient_of_step_sizes_is_minus_the_product_of_both_gradients():
    model, batch = adapted_llama(settings={"step_size_mode": "full"}), episodes(1, 2)
    documents, mask = batch["document_ids"], batch["document_mask"]
    summed = passage_gradients(model, documents, mask)[0].sum(0)
    end = (-step_sizes(model).detach() * summed)[None].requires_grad_()
    with updated(model, end):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED_LABEL)
    (after,) = torch.autograd.grad(loss, end)
    expected = -(summed * after[0])
    assert relative(meta_gradients(model, batch).step_sizes, expected) < 1e-5


def test_sdpa_has_no_second_derivative_and_meta_gradients_avoid_it():
    batch = episodes(2, 2)
    settings = {"initial_step_size": 0.5}
    eager = meta_gradients(adapted_llama(settings=settings), batch)
    model = adapted_llama(settings=settings, attention="sdpa")
    found = meta_gradients(model, batch)
    assert relative(found.adapter, eager.adapter) < 1e-4
    assert model.config._attn_implementation == "sdpa"
    # the premise: without the guard, this attention has no second derivative
    delta = torch.zeros(4, layout(model).size, requires_grad=True)
    with updated(model, delta):
        loss = model(batch["document_ids"], attention_mask=batch["document_mask"]).logits.sum()
        (once,) = torch.autograd.grad(loss, delta, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.autograd.grad(once.sum(), delta)


@pytest.mark.parametrize("order", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(order):
    batch = episodes(2, 2)
    expected = meta_gradients(adapted_llama(), batch, order=order)
    model = adapted_llama().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = meta_gradients(model, batch, order=order)
    assert len(calls) > 2  # passages and question once each, and once more in the backward pass
    assert relative(found.adapter, expected.adapter) < 1e-6
    assert relative(found.step_sizes, expected.step_sizes) < 1e-6


def test_autocast_keeps_the_direction_of_the_gradient():
    model, batch = adapted_llama(), episodes(4, 2)
    expected = meta_gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = meta_gradients(model, batch)
    cosine = torch.nn.functional.cosine_similarity(found.adapter, expected.adapter, dim=0)
    assert found.adapter.dtype == torch.float32
    assert cosine > 0.99


@pytest.mark.parametrize("mode", ["tie", "same", "full", "fix"])
def test_every_step_size_mode_has_gradients(mode):
    model = adapted_llama(settings={"step_size_mode": mode})
    Meta(ReGradConfig()).step(model, episodes(2, 1))["loss"].backward()
    learned = [p for a in adapters(model).values() for name, p in a.named_parameters() if "step" in name]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learned)
    assert all(adapter.lora_A.grad is not None for adapter in adapters(model).values())


def questions_loss(model, batch):
    """Mean loss of the answers by the reference, without a step."""
    dense, theta, scaling = plain_copy(model), theta_of(model), next(iter(adapters(model).values())).scaling
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return torch.stack([reference.text_loss(dense, theta, scaling, row, len(row) - ANSWER) for row in rows]).mean()


def test_text_and_answers_loss_is_the_mean_of_both_losses():
    model, batch = adapted_llama(), episodes(2, 3)
    step = {
        kind: Meta(ReGradConfig(outer_loss=False, plain_loss=kind)).step(model, batch)
        for kind in ("text", "answers", "text_and_answers")
    }
    text, answers, both = (step[kind]["loss"] for kind in step)
    assert answers.item() == pytest.approx(questions_loss(model, batch).item(), rel=1e-5)
    assert both.item() == pytest.approx((text.item() + questions_loss(model, batch).item()) / 2, rel=1e-5)
    halves = step["text_and_answers"]
    assert (halves["inner_loss"].item(), halves["answer_loss"].item()) == pytest.approx((text.item(), answers.item()))
    learned = [p for adapter in adapters(model).values() for p in (adapter.lora_A, adapter.lora_B)]
    gradients = [torch.autograd.grad(loss, learned) for loss in (text, answers, both)]
    for of_text, of_answers, of_both in zip(*gradients, strict=True):
        assert relative(of_both, (of_text + of_answers) / 2) < 1e-5
    with pytest.raises(ConfigError, match="plain_loss is answers, which has no effect while outer_loss is on"):
        ReGradConfig(plain_loss="answers")


def test_text_loss_runs_no_question_and_trains_no_step_size():
    model, batch = adapted_llama(), episodes(2, 3)
    dense, lengths = plain_copy(model), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    loss = Meta(ReGradConfig(outer_loss=False)).step(model, batch)["loss"]
    assert lengths == [batch["document_ids"].shape]
    theta, scaling = theta_of(model), next(iter(adapters(model).values())).scaling
    rows = [ids[mask.bool()] for ids, mask in zip(batch["document_ids"], batch["document_mask"], strict=True)]
    expected = torch.stack([reference.text_loss(dense, theta, scaling, row) for row in rows]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    for adapter in adapters(model).values():
        assert adapter.step_size_A.grad is None
        assert adapter.step_size_B.grad is None
        assert adapter.lora_B.grad.abs().sum() > 0
