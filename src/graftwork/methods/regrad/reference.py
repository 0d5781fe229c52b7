"""Literal definition of ReGrad: one gradient after the other, one step, and the loss after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Theta = Mapping[str, Tensor]
"""Adapter θ: `<path>.lora_A` [rank inputs] and `<path>.lora_B` [outputs rank] of every adapted projection."""
Loss = Callable[[Theta], Tensor]
"""Scalar loss as a function of the adapter."""


def inner_gradient(theta: Theta, document: Loss, *, keep_graph: bool = True) -> dict[str, Tensor]:
    """g_d(θ) = ∇_θ L_LM(d; θ)."""
    names = list(theta)
    gradients = torch.autograd.grad(document(theta), [theta[name] for name in names], create_graph=keep_graph)
    return dict(zip(names, gradients, strict=True))


def stepped(theta: Theta, alpha: Theta, documents: Sequence[Loss], gamma: float = 1.0) -> dict[str, Tensor]:
    """θ' = θ − γ · α ⊙ Σ_d g_d(θ), with all gradients taken at the same θ."""
    result = dict(theta)
    for document in documents:
        for name, gradient in inner_gradient(theta, document).items():
            result[name] = result[name] - gamma * alpha[name] * gradient
    return result


def outer_gradients(
    theta: Theta, alpha: Theta, documents: Sequence[Loss], question: Loss
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """L_QA(θ') and its exact gradients ∇_θ and ∇_α, differentiated through the step."""
    loss = question(stepped(theta, alpha, documents))
    gradients = torch.autograd.grad(loss, [*theta.values(), *alpha.values()])
    return loss, dict(zip(theta, gradients, strict=False)), dict(zip(alpha, gradients[len(theta) :], strict=True))


def merged(model: nn.Module, theta: Theta, scaling: float) -> dict[str, Tensor]:
    """W + s · B A [outputs inputs] for every adapted projection, by the name of its weight."""
    paths = [name.removesuffix(".lora_A") for name in theta if name.endswith(".lora_A")]
    return {
        f"{path}.weight": model.get_parameter(f"{path}.weight")
        + scaling * theta[f"{path}.lora_B"] @ theta[f"{path}.lora_A"]
        for path in paths
    }


def text_loss(model: nn.Module, theta: Theta, scaling: float, input_ids: Tensor, first: int = 1) -> Tensor:
    """Mean of −log p(x_t | x_<t) over the positions t ≥ `first` of one sequence.

    Args:
        model: Model without adapters.
        theta: Adapter θ.
        scaling: s, the scale of the low-rank product.
        input_ids: Sequence `input_ids` [tokens].
        first: First predicted position: 1 for documents, the first token of the answer for questions.
    """
    batch = input_ids[None]  # [1 tokens]
    output: Any = functional_call(model, merged(model, theta, scaling), (batch,), {"use_cache": False})
    logits: Tensor = output.logits[0]  # [tokens vocabulary]
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(
        -1
    )  # [tokens vocabulary]
    chosen = log_probabilities[:-1].gather(-1, input_ids[1:, None])[:, 0]  # [tokens-1]
    return -chosen[first - 1 :].mean()
