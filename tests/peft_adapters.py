"""Adapters of PEFT on the shipped models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TARGETS = {"decoder": ["q_proj", "down_proj"], "encoder_decoder": ["q", "wo"]}
"""Adapted modules by the kind of a shipped model."""


def adapted(base: nn.Module, kind: str) -> Any:
    """Wrap a model with an adapter that changes its outputs."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[kind], init_lora_weights=False)
    return peft.get_peft_model(base, config).eval()
