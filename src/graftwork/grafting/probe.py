"""Output of a model for a fixed input, recorded when it is saved and compared when it is loaded."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

from graftwork.grafting.activity import check_active
from graftwork.surgery.sites import pretrained

PROBE_TOKENS = 8

PROBE_VALUES = 16


@torch.no_grad()
def probe_model(model: nn.Module) -> dict[str, Any]:
    """Output of a model for a fixed input, compared at loading.

    Returns:
        Some of the last logits as numbers, a hash over all of them, which is equal only on the same machine, and False
        as `finite` if any is NaN or +inf; −inf excludes a token.
    """
    check_active(model, "run the model")
    inner = pretrained(model)
    config: Any = inner.config
    vocabulary = int(config.get_text_config().vocab_size)
    weight: Any = inner.get_input_embeddings().weight
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    ids = (torch.arange(PROBE_TOKENS, device=device) * 7 + 3) % vocabulary
    batch = {"input_ids": ids[None]}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[None, :4]
    training = model.training
    model.eval()
    try:
        outputs = model(**batch)
    finally:
        model.train(training)
    values = outputs[0].float().cpu().reshape(-1)
    positions = torch.linspace(0, len(values) - 1, min(PROBE_VALUES, len(values))).long()
    return {
        "values": [float(f"{value:.6g}") for value in values[positions]],
        "hash": hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16],
        "dtype": str(outputs[0].dtype).removeprefix("torch."),
        "finite": bool((values < math.inf).all()),
    }
