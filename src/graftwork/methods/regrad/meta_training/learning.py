"""Meta-gradients: gradients of the answers' loss through one gradient step on passages, for a batch of questions."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graftwork.methods.regrad import functional
from graftwork.methods.regrad.modules import flat_adapter, step_sizes, updated
from graftwork.surgery.sites import pretrained

Batch = Mapping[str, Tensor]
"""Result of `EpisodeCollator`."""


@dataclass(frozen=True, slots=True)
class MetaGradients:
    """Meta-gradients and measurements of one batch."""

    loss: Float[Tensor, ""]
    """Mean loss of the answers after the step."""
    inner_loss: Float[Tensor, ""]
    """Mean loss of the passages before the step."""
    adapter: Float[Tensor, " numbers"]
    """Gradient of the loss with respect to the adapter, in the order of the layout."""
    step_sizes: Float[Tensor, " numbers"]
    """Gradient of the loss with respect to the step size of every number of the adapter."""
    gradient_norm: Float[Tensor, ""]
    """Mean over questions of ‖g_q‖, the norm of the summed gradients of the question's passages."""
    update_ratio: Float[Tensor, ""]
    """Mean over questions of ‖α ⊙ g_q‖ / ‖θ‖, the norm of the step relative to that of the adapter."""


def meta_gradients(model: nn.Module, batch: Batch, *, order: int = 2) -> MetaGradients:
    """Gradients of the answers' loss after one gradient step on the passages, with respect to adapter and step sizes.

    For question q with passages D_q, adapter θ and step sizes α,

        g_q = ∇_θ Σ_{d ∈ D_q} L_LM(d; θ)        gradient of the passages
        θ'_q = θ − α ⊙ g_q                      adapter after the step
        v_q = ∇_{θ'} L_QA(q; θ'_q) / Q          gradient after the step, of the mean over Q questions
        H_q = ∇²_θ Σ_{d ∈ D_q} L_LM(d; θ)       Hessian of the passages' loss
        ∂L/∂θ = Σ_q v_q − H_q (α ⊙ v_q)
        ∂L/∂α = −Σ_q g_q ⊙ v_q

    The Hessian-vector product is a second backward pass: H_q u = ∇_θ ⟨g_q, u⟩. Each question has its own displacement
    δ_q = 0 of the adapter, with respect to which the losses are differentiated, so that one forward pass serves the
    whole batch.

    Source: ReGrad, outer objective; the authors differentiate one question after the other through the whole step.
    Differs from it: batched; the loss after the step uses the model's own attention kernel.

    Args:
        model: The converted model.
        batch: Result of `EpisodeCollator`.
        order: 2 for exact gradients; 1 omits the Hessian-vector product, which saves its backward pass.
    """
    anchor = flat_adapter(model).detach()  # [numbers]
    tasks, owners = len(batch["input_ids"]), batch["document_task"].to(anchor.device)
    delta = anchor.new_zeros(tasks, anchor.numel(), requires_grad=True)  # [tasks numbers]
    with torch.enable_grad(), _inner(model, delta, owners):
        inner = losses_of(model, batch["document_ids"], batch["document_mask"])  # [passages]
        with _exact(delta):
            (gradients,) = torch.autograd.grad(inner.sum(), delta, create_graph=order == 2)  # g: [tasks numbers]
    fixed, sizes = gradients.detach(), step_sizes(model).detach()
    step = functional.update(sizes, fixed).requires_grad_()  # −α ⊙ g: [tasks numbers]
    with torch.enable_grad(), updated(model, step, shared=True):
        loss = losses_of(model, batch["input_ids"], batch["attention_mask"], batch["labels"]).mean()
        with _exact(delta):
            (after,) = torch.autograd.grad(loss, step)  # v: [tasks numbers]
    adapter = after.sum(0)  # [numbers]
    if order == 2:
        with _inner(model, delta, owners), _exact(delta):
            # H (α ⊙ v): [numbers] broadcast over [tasks numbers]
            (curvature,) = torch.autograd.grad(gradients, delta, grad_outputs=sizes * after)
        adapter = adapter - curvature.sum(0)
    return MetaGradients(
        loss.detach(),
        inner.detach().mean(),
        adapter,
        -(fixed * after).sum(0),
        functional.norms(fixed).mean(),
        (functional.norms(step.detach()) / functional.norms(anchor)).mean(),
    )


def losses_of(
    model: nn.Module,
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"],
    labels: Int[Tensor, "rows tokens"] | None = None,
) -> Float[Tensor, " rows"]:
    """Return the mean token loss of every row: over its labelled tokens, or without labels over all its tokens."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    chosen = functional.document_labels(input_ids, attention_mask) if labels is None else labels
    return functional.mean_token_losses(logits, chosen)


def with_gradients(value: Float[Tensor, ""], *pairs: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """Return a scalar equal to `value` whose backward pass yields given gradients.

    It is value + Σ_i (⟨p_i, g_i⟩ − stop_gradient ⟨p_i, g_i⟩) for pairs (p_i, g_i) of parameters and gradients, so that
    the trainer's own `backward` accumulates gradients that were computed before.

    Args:
        value: Scalar, detached.
        pairs: Tensors of parameters [numbers], each with its gradient [numbers].
    """
    result = value.detach()
    for tensor, gradient in pairs:
        if tensor.requires_grad:
            # the adapters of a model on several devices are on another one than its loss
            product = (tensor * gradient).sum().to(result.device)
            result = result + (product - product.detach())
    return result


@contextmanager
def twice_differentiable(model: nn.Module) -> Generator[None]:
    """Use attention with a second derivative for the forward passes inside; fused kernels have none."""
    config: Any = pretrained(model).config
    kind = config._attn_implementation
    fused = kind is not None and kind != "sdpa" and ("flash" in kind or "flex" in kind or kind.startswith("sdpa"))
    config._attn_implementation = "eager" if fused else kind
    try:
        # for every kind: layers that another method left alone may use SDPA
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        config._attn_implementation = kind


@contextmanager
def _inner(
    model: nn.Module, delta: Float[Tensor, "tasks numbers"], owners: Int[Tensor, " passages"]
) -> Generator[None]:
    """Apply its question's displacement to every passage, with twice differentiable attention."""
    displacements = delta[owners]  # [passages numbers]
    with twice_differentiable(model), updated(model, displacements, shared=True):
        yield


def _exact(like: Tensor) -> torch.autocast:
    # under autocast, a backward pass could use other dtypes than its forward pass
    return torch.autocast(like.device.type, enabled=False)
