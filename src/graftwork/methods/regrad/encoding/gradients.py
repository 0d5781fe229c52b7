"""Exact per-row gradients of a batch of passages in one forward and one partial backward pass."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftwork.errors import DataError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.modules import adapters, recorded
from graftwork.surgery.sites import pretrained

LOCK = threading.RLock()
"""Held while differentiating, because parameters are frozen for all threads meanwhile."""
LOGIT_BYTES = {"cpu": 4 << 20}
"""Bytes of the logits that are in memory at once, by type of device; those of a CPU should stay in its cache."""
ACCELERATOR_LOGIT_BYTES = 1 << 30
"""The same for all other devices."""
FEWEST_TOKENS = 128
"""Minimum number of tokens whose logits are computed at once, below which reading the output layer dominates."""
_PLAIN_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
    with LOCK, evaluating(model), torch.enable_grad():
        # before recording, because it runs the model
        whole = not _has_plain_head(model, input_ids)
        # around the backward pass too: layers that it recomputes need the outputs of adapters as leaves again
        with recorded() as records:
            top, losses, top_gradient = _forward(model, input_ids, attention_mask, whole=whole)
            found = adapters(model)
            # copied, because recomputed layers append to the records again
            calls = [(adapter, *call) for adapter in found.values() for call in records[adapter]]
            gradients = torch.autograd.grad(top, [output for _, _, output in calls], top_gradient)
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


def _forward(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, whole: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tensor and its gradient from which the backward pass starts, with the losses of all rows between them.

    That is the input of the output layer, so that logits exist for a part of the tokens at a time; with `whole` the sum
    of the losses, for models that change the output layer's result, for example by a cap.
    """
    # without a mask, attention is purely causal, for which kernels skip half the work; no token attends to the padding,
    # because it is on the right
    labels = functional.document_labels(input_ids, attention_mask)
    if whole:
        logits = model(input_ids=input_ids, use_cache=False).logits  # [rows tokens vocabulary]
        losses = functional.mean_token_losses(logits, labels)
        return losses.sum(), losses, None
    inner: Any = pretrained(model)
    head: Any = inner.get_output_embeddings()
    with _without_head(head):
        hidden: Tensor = model(input_ids=input_ids, use_cache=False).logits  # [rows tokens hidden]
    config: Any = inner.config
    room = LOGIT_BYTES.get(hidden.device.type, ACCELERATOR_LOGIT_BYTES)
    together = max(FEWEST_TOKENS, room // (4 * config.get_text_config().vocab_size))
    losses, gradient = functional.head_losses(head, hidden, labels.to(hidden.device), together)
    return hidden, losses, gradient


def _has_plain_head(model: nn.Module, input_ids: Tensor) -> bool:
    """True if the logits are the output layer's result, unchanged; decided by a forward pass of one token."""
    if model not in _PLAIN_HEADS:
        inner: Any = pretrained(model)
        head: Any = inner.get_output_embeddings()
        outputs: list[Any] = []
        caller = threading.get_ident()

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == caller:
                outputs.append(output)

        if head is not None:
            hook = head.register_forward_hook(keep)
            try:
                with torch.no_grad():
                    logits = model(input_ids=input_ids[:1, :1], use_cache=False).logits
            finally:
                hook.remove()
            # the same object: an equal one may differ for other inputs
            outputs = [len(outputs) == 1 and outputs[0] is logits]
        _PLAIN_HEADS[model] = bool(outputs and outputs[0])
    return _PLAIN_HEADS[model]


@contextmanager
def _without_head(head: nn.Module) -> Generator[None]:
    """Leave the output layer out of this thread's forward passes inside, which return its input.

    Other threads answer questions with the same model meanwhile.
    """
    own, whole, caller = head.__dict__.get("forward"), head.forward, threading.get_ident()

    def forward(x: Tensor) -> Tensor:
        return x if threading.get_ident() == caller else whole(x)

    head.forward = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.forward = own


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
