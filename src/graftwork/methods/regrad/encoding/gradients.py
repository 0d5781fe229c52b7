"""Exact per-row gradients of a batch of passages in one forward and one partial backward pass."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftwork.errors import DataError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.modules import adapters, recorded

LOCK = threading.RLock()
"""Held while differentiating, because parameters are frozen for all threads meanwhile."""


def passage_gradients(
    model: nn.Module, input_ids: Int[Tensor, "rows tokens"], attention_mask: Int[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows numbers"], Float[Tensor, " rows"]]:
    """Gradient of every row's mean token loss with respect to the adapter: g_r = ∇_θ L_r(θ).

    L_r is `functional.mean_token_losses`, θ are the current adapter parameters. The model runs in evaluation mode.
    Frozen weights get no gradient, and nothing below the lowest adapted projection is differentiated.

    Source: ReGrad's document gradient. Differs from the authors' code: batched, in float32, without dropout.

    Args:
        model: The converted model.
        input_ids: Token ids of the passages, padded on the right.
        attention_mask: 1 for tokens, 0 for padding.

    Returns:
        Float32 gradients in the order of the layout, and the losses.

    Raises:
        DataError: If a passage has fewer than two tokens, so that no token is predicted.
    """
    short = attention_mask.sum(-1) < 2  # [rows]
    if bool(short.any()):
        row = int(short.nonzero()[0])
        raise DataError(
            f"Found a passage of {int(attention_mask[row].sum())} tokens in row {row}; expected at least 2, "
            "because the first one is not predicted. Leave empty passages out."
        )
    with LOCK, evaluating(model), torch.enable_grad(), recorded() as records:
        # without a mask, attention is purely causal, for which kernels skip half the work; no token attends to the
        # padding, because it is on the right
        logits = model(input_ids=input_ids, use_cache=False).logits  # [rows tokens vocabulary]
        losses = functional.mean_token_losses(logits, functional.document_labels(input_ids, attention_mask))
        found = adapters(model)
        # copied, because layers recomputed in the backward pass append to the records again
        calls = [(adapter, *call) for adapter in found.values() for call in records[adapter]]
        gradients = torch.autograd.grad(losses.sum(), [output for _, _, output in calls])
    rows = len(input_ids)
    totals: dict[nn.Module, list[Tensor]] = {}
    for (adapter, inputs, _), gradient in zip(calls, gradients, strict=True):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        own = (adapter.lora_A.detach().to(wide), adapter.lora_B.detach().to(wide))
        with torch.autocast(gradient.device.type, enabled=False):
            both = functional.per_example_gradients(inputs.to(wide), gradient.to(wide), *own, adapter.scaling)
        # a projection that is called several times sums over its calls
        before = totals.get(adapter)
        totals[adapter] = list(both) if before is None else [old + new for old, new in zip(before, both, strict=True)]
    parts = [
        part.reshape(rows, -1).to(input_ids.device, torch.float32)  # [rows, numbers of the tensor]
        for adapter in found.values()
        for part in totals[adapter]
    ]
    return torch.cat(parts, dim=1), losses.detach().float()


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode with all parameters frozen; restores both afterwards."""
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
