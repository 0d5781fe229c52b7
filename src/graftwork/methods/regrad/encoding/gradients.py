"""Gradients of passages: exact, for each row of a batch, in one forward and one partial backward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftwork.errors import DataError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.modules import adapters, recorded

LOCK = threading.RLock()
"""One thread at a time differentiates: parameters are frozen meanwhile."""


def passage_gradients(
    model: nn.Module, input_ids: Int[Tensor, "rows tokens"], attention_mask: Int[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows numbers"], Float[Tensor, " rows"]]:
    """The gradient of every row's mean token loss with respect to the adapter, as it stands.

    The model is in evaluation mode meanwhile. Frozen weights get no gradient, and nothing below the lowest adapted
    projection is differentiated.

    Source: ReGrad's document gradient. Differs from the authors' code: many passages at once, in 32 bits, without
    dropout.

    Args:
        model: The converted model.
        input_ids: Passages, padded on the right.
        attention_mask: 1 for tokens, 0 for padding.

    Returns:
        Gradients in the order of the layout, in 32 bits, and the losses.

    Raises:
        DataError: If a passage has less than two tokens, so that there is nothing to predict.
    """
    short = (attention_mask.sum(-1) < 2).nonzero().flatten().tolist()
    if short:
        raise DataError(
            f"Found a passage of {int(attention_mask[short[0]].sum())} tokens in row {short[0]}; expected at least 2, "
            "because the first one is not predicted. Leave empty passages out."
        )
    with LOCK, evaluating(model), torch.enable_grad(), recorded() as records:
        # without a mask, attention is plainly causal, for which kernels skip half the work; no token sees the padding,
        # because it stands behind
        logits = model(input_ids=input_ids, use_cache=False).logits
        losses = functional.mean_token_losses(logits, functional.document_labels(input_ids, attention_mask))
        found = adapters(model)
        # a list of its own: what is computed again in the backward pass is recorded again
        calls = [(adapter, *call) for adapter in found.values() for call in records[adapter]]
        gradients = torch.autograd.grad(losses.sum(), [output for _, _, output in calls])
    rows = len(input_ids)
    totals: dict[nn.Module, list[torch.Tensor]] = {}
    for (adapter, inputs, _), gradient in zip(calls, gradients, strict=True):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        own = (adapter.lora_A.detach().to(wide), adapter.lora_B.detach().to(wide))
        with torch.autocast(gradient.device.type, enabled=False):
            both = functional.per_example_gradients(inputs.to(wide), gradient.to(wide), *own, adapter.scaling)
        before = totals.get(adapter)
        totals[adapter] = list(both) if before is None else [old + new for old, new in zip(before, both, strict=True)]
    parts = [
        part.reshape(rows, -1).to(input_ids.device, torch.float32)
        for adapter in found.values()
        for part in totals[adapter]
    ]
    return torch.cat(parts, dim=1), losses.detach().float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter differentiated."""
    training = [module for module in model.modules() if module.training]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
