"""The gradients of meta-training: through one gradient step on passages, exactly, for a whole batch of questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graftwork.methods.regrad import functional
from graftwork.methods.regrad.modules import flat_adapter, step_sizes, updated
from graftwork.surgery.sites import pretrained

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class MetaGradients:
    """What one batch says about the adapter and the step sizes."""

    loss: Float[Tensor, ""]
    """Mean loss of the answers after the step."""
    inner_loss: Float[Tensor, ""]
    """Mean loss of the passages before it."""
    adapter: Float[Tensor, " numbers"]
    """Gradient of the loss with respect to the adapter, in the order of the layout."""
    step_sizes: Float[Tensor, " numbers"]
    """Gradient of the loss with respect to every number's step size."""
    gradient_norm: Float[Tensor, ""]
    """Mean norm of a question's summed passage gradients."""
    update_ratio: Float[Tensor, ""]
    """Mean norm of the step, relative to that of the adapter."""


def meta_gradients(model: nn.Module, batch: Batch, *, order: int = 2) -> MetaGradients:
    """Gradients of the answers' loss after one step on the passages, with respect to where the step began.

    With v the gradient at the end of a question's step and H the second derivative of its passages' loss, they are
    v − H(α ⊙ v) for the adapter and −g ⊙ v for the step sizes. All questions of the batch go through the model at once:
    each has a displacement of the adapter of its own, at zero, and the passages' loss is differentiated with respect to
    that.

    Source: ReGrad, outer objective; the authors differentiate one question after the other through the whole.
    Differs from it: batched, the loss after the step is computed by whatever attention kernel the model has.

    Args:
        model: The converted model.
        batch: What `EpisodeCollator` makes.
        order: 1 leaves the product with H out.
    """
    anchor = flat_adapter(model).detach()
    tasks, owners = len(batch["input_ids"]), batch["document_task"].to(anchor.device)
    delta = anchor.new_zeros(tasks, anchor.numel(), requires_grad=True)
    with torch.enable_grad(), _inner(model, delta, owners):
        inner = losses_of(model, batch["document_ids"], batch["document_mask"])
        with _exact(delta):
            (gradients,) = torch.autograd.grad(inner.sum(), delta, create_graph=order == 2)
    fixed, sizes = gradients.detach(), step_sizes(model).detach()
    step = functional.update(sizes, fixed).requires_grad_()
    with torch.enable_grad(), updated(model, step, shared=True):
        loss = losses_of(model, batch["input_ids"], batch["attention_mask"], batch["labels"]).mean()
        with _exact(delta):
            (after,) = torch.autograd.grad(loss, step)
    adapter = after.sum(0)
    if order == 2:
        with _inner(model, delta, owners), _exact(delta):
            (curvature,) = torch.autograd.grad(gradients, delta, grad_outputs=sizes * after)
        adapter = adapter - curvature.sum(0)
    norms, moved = fixed.norm(dim=1), step.detach().norm(dim=1)
    return MetaGradients(
        loss.detach(),
        inner.detach().mean(),
        adapter,
        -(fixed * after).sum(0),
        norms.mean(),
        (moved / anchor.norm()).mean(),
    )


def losses_of(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean token loss of every row: of the labelled tokens, or of all of a plain text."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    chosen = functional.document_labels(input_ids, attention_mask) if labels is None else labels
    return functional.mean_token_losses(logits, chosen)


def with_gradients(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`value`, as a function that has these gradients: each pair is a tensor of parameters and its gradient."""
    result = value.detach()
    for tensor, gradient in pairs:
        if tensor.requires_grad:
            product = (tensor * gradient).sum()
            result = result + (product - product.detach())
    return result


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Attention that has a second derivative, for forward passes inside; fused kernels have none."""
    config: Any = pretrained(model).config
    kind = config._attn_implementation
    if kind == "sdpa":
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    fused = kind is not None and ("flash" in kind or "flex" in kind or kind.startswith("sdpa"))
    config._attn_implementation = "eager" if fused else kind
    try:
        yield
    finally:
        config._attn_implementation = kind


@contextmanager
def _inner(model: nn.Module, delta: Tensor, owners: Tensor) -> Iterator[None]:
    """Every passage at its question's displacement, under attention that can be differentiated twice."""
    with twice_differentiable(model), updated(model, delta[owners], shared=True):
        yield


def _exact(like: Tensor) -> torch.autocast:
    # a backward pass under automatic mixed precision would choose other types than its forward pass had
    return torch.autocast(like.device.type, enabled=False)
