"""Meta-gradients: gradients of the answers' loss through one gradient step on passages, for a batch of questions."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graftwork.methods.regrad import functional
from graftwork.methods.regrad.meta_training.lower_layers import LowerLayers
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Passages of one batch that are differentiated together."""

    rows: Sequence[int]
    """Numbers of the passages in the batch."""
    tokens: int
    """Number of tokens of the longest one; padding beyond it is cut off."""


@dataclass(frozen=True, slots=True)
class Differentiated:
    """Losses of a chunk's passages and their gradients with respect to a displacement of the adapter."""

    displacements: Float[Tensor, "passages numbers"]
    losses: Float[Tensor, " passages"]
    gradients: Float[Tensor, "passages numbers"]


def meta_gradients(
    model: nn.Module, batch: Batch, *, order: int = 2, chunks: Sequence[Chunk] | None = None
) -> MetaGradients:
    """Gradients of the answers' loss after one gradient step on the passages, with respect to adapter and step sizes.

    For question q with passages D_q, adapter θ and step sizes α,

        g_d = ∇_θ L_LM(d; θ)                    gradient of passage d
        g_q = Σ_{d ∈ D_q} g_d
        θ'_q = θ − α ⊙ g_q                      adapter after the step
        v_q = ∇_{θ'} L_QA(q; θ'_q) / Q          gradient after the step, of the mean over Q questions
        H_d = ∇²_θ L_LM(d; θ)                   Hessian of the loss of passage d
        ∂L/∂θ = Σ_q v_q − Σ_{d ∈ D_q} H_d (α ⊙ v_q)
        ∂L/∂α = −Σ_q g_q ⊙ v_q

    The Hessian-vector product is a second backward pass: H_d u = ∇_θ ⟨g_d, u⟩. Each passage has its own displacement
    δ_d = 0 of the adapter, with respect to which its loss is differentiated, so that one forward pass serves a chunk.

    Without chunks, the graph of all passages is kept until v is known. With chunks, the graph of one at a time is in
    memory: gradients are computed without a graph first, and the forward and backward pass of a chunk are repeated for
    its Hessian-vector product, from the first adapted layer on.

    Source: ReGrad, outer objective; the authors differentiate one question after the other through the whole step.
    Differs from it: batched over questions and passages; the loss after the step uses the model's own attention kernel.

    Args:
        model: The converted model.
        batch: Result of `EpisodeCollator`.
        order: 2 for exact gradients; 1 omits the Hessian-vector product, which saves its backward pass.
        chunks: Partition of the passages; None differentiates all of them at once.
    """
    anchor = flat_adapter(model).detach()  # [numbers]
    passages, tokens = batch["document_ids"].shape
    parts = [Chunk(range(passages), tokens)] if chunks is None else chunks
    owners = batch["document_task"].to(anchor.device)  # [passages]
    summed = anchor.new_zeros(len(batch["input_ids"]), anchor.numel())  # g: [tasks numbers]
    inner, graph = anchor.new_zeros(()), None
    single = order == 2 and chunks is None
    lower = [LowerLayers(model) for _ in parts]
    for part, below in zip(parts, lower, strict=True):
        with nullcontext() if single or order == 1 else below.kept():
            found = differentiate(model, *_rows(batch, part), create_graph=single)
        summed.index_add_(0, owners[_index(part, owners)], found.gradients.detach())
        inner += found.losses.detach().sum().to(inner)
        graph = found if single else None
        # otherwise it would stay in memory during the next chunk
        del found
    sizes = step_sizes(model).detach()
    step = functional.update(sizes, summed).requires_grad_()  # −α ⊙ g: [tasks numbers]
    with torch.enable_grad(), updated(model, step, shared=True):
        loss = losses_of(model, batch["input_ids"], batch["attention_mask"], batch["labels"]).mean()
        with _exact(anchor):
            (after,) = torch.autograd.grad(loss, step)  # v: [tasks numbers]
    adapter = after.sum(0)  # [numbers]
    for part, below in zip(parts, lower, strict=True) if order == 2 else ():
        with below.reused():
            found = differentiate(model, *_rows(batch, part), create_graph=True) if graph is None else graph
        # α ⊙ v of each passage's question: [numbers] broadcast over [passages numbers]
        adapter -= hessian_products(model, found, sizes * after[owners[_index(part, owners)]]).sum(0)
        del found
    return MetaGradients(
        loss.detach(),
        inner / passages,
        adapter,
        -(summed * after).sum(0),
        functional.norms(summed).mean(),
        (functional.norms(step.detach()) / functional.norms(anchor)).mean(),
    )


def differentiate(
    model: nn.Module,
    input_ids: Int[Tensor, "passages tokens"],
    attention_mask: Int[Tensor, "passages tokens"],
    *,
    create_graph: bool,
) -> Differentiated:
    """Differentiate the loss of every passage with respect to a displacement of the adapter of its own.

    Args:
        model: The converted model.
        input_ids: Token ids of the passages, padded on the right.
        attention_mask: 1 for tokens, 0 for padding.
        create_graph: Make the gradients differentiable.
    """
    anchor = flat_adapter(model).detach()  # [numbers]
    displacements = anchor.new_zeros(len(input_ids), anchor.numel(), requires_grad=True)  # [passages numbers]
    with torch.enable_grad(), _displaced(model, displacements):
        losses = losses_of(model, input_ids, attention_mask)  # [passages]
        with _exact(anchor):
            (gradients,) = torch.autograd.grad(losses.sum(), displacements, create_graph=create_graph)
    return Differentiated(displacements, losses, gradients)


def hessian_products(
    model: nn.Module, found: Differentiated, vectors: Float[Tensor, "passages numbers"]
) -> Float[Tensor, "passages numbers"]:
    """Return H_d u_d for every passage d of a chunk, by a second backward pass; frees the graph.

    Args:
        model: The converted model.
        found: Result of `differentiate` with a graph.
        vectors: u, one for each passage.
    """
    # layers recomputed in the backward pass need the displacements again
    with _displaced(model, found.displacements), _exact(vectors):
        (products,) = torch.autograd.grad(found.gradients, found.displacements, grad_outputs=vectors)
    return products


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
def _displaced(model: nn.Module, displacements: Float[Tensor, "passages numbers"]) -> Generator[None]:
    """Apply its displacement to every passage, with twice differentiable attention."""
    with twice_differentiable(model), updated(model, displacements, shared=True):
        yield


def _index(chunk: Chunk, like: Tensor) -> slice | Tensor:
    """Index of a chunk's passages into a tensor on the device of `like`; a slice, which copies nothing, if possible."""
    first = chunk.rows[0]
    if list(chunk.rows) == list(range(first, first + len(chunk.rows))):
        return slice(first, first + len(chunk.rows))
    return torch.tensor(chunk.rows, device=like.device)


def _rows(batch: Batch, chunk: Chunk) -> tuple[Int[Tensor, "passages tokens"], Int[Tensor, "passages tokens"]]:
    """Token ids and mask of a chunk."""
    index = _index(chunk, batch["document_ids"])
    return batch["document_ids"][index, : chunk.tokens], batch["document_mask"][index, : chunk.tokens]


def _exact(like: Tensor) -> torch.autocast:
    # under autocast, a backward pass could use other dtypes than its forward pass
    return torch.autocast(like.device.type, enabled=False)
