"""The definition of ReGrad, literally: one gradient after the other, one step, and the loss after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Theta = Mapping[str, Tensor]
"""The adapter: `<path>.lora_A` and `<path>.lora_B` of every adapted projection."""
Loss = Callable[[Theta], Tensor]


def inner_gradient(theta: Theta, document: Loss, *, keep_graph: bool = True) -> dict[str, Tensor]:
    """g_d(θ) = ∇_θ L_LM(d; θ)."""
    names = list(theta)
    gradients = torch.autograd.grad(document(theta), [theta[name] for name in names], create_graph=keep_graph)
    return dict(zip(names, gradients, strict=True))


def stepped(theta: Theta, alpha: Theta, documents: Sequence[Loss], gamma: float = 1.0) -> dict[str, Tensor]:
    """θ' = θ − γ · α ⊙ Σ_d g_d(θ), all gradients at the same θ."""
    result = dict(theta)
    for document in documents:
        for name, gradient in inner_gradient(theta, document).items():
            result[name] = result[name] - gamma * alpha[name] * gradient
    return result


def outer_gradients(
    theta: Theta, alpha: Theta, documents: Sequence[Loss], question: Loss
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """L_QA(θ'), and its exact gradients with respect to θ and α, through the step."""
    loss = question(stepped(theta, alpha, documents))
    gradients = torch.autograd.grad(loss, [*theta.values(), *alpha.values()])
    return loss, dict(zip(theta, gradients, strict=False)), dict(zip(alpha, gradients[len(theta) :], strict=True))


def merged(model: nn.Module, theta: Theta, scaling: float) -> dict[str, Tensor]:
    """W + s·B·A for every adapted projection, by the name of its weight."""
    paths = [name.removesuffix(".lora_A") for name in theta if name.endswith(".lora_A")]
    return {
        f"{path}.weight": model.get_parameter(f"{path}.weight")
        + scaling * theta[f"{path}.lora_B"] @ theta[f"{path}.lora_A"]
        for path in paths
    }


def text_loss(model: nn.Module, theta: Theta, scaling: float, input_ids: Tensor, first: int = 1) -> Tensor:
    """Mean of −log p(x_t | x_<t) over the positions from `first` on of one sequence [tokens].

    Args:
        model: The model without any adapter.
        theta: The adapter.
        scaling: Factor of the low-rank product.
        input_ids: The sequence.
        first: First position that is predicted: 1 for documents, that of the answer for questions.
    """
    logits = functional_call(model, merged(model, theta, scaling), (input_ids[None],), {"use_cache": False}).logits[0]
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = log_probabilities[:-1].gather(-1, input_ids[1:, None])[:, 0]
    return -chosen[first - 1 :].mean()
