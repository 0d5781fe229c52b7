"""Registration of the model type `graftwork` when lm-eval is imported; imports nothing heavy."""

from __future__ import annotations

from typing import Any

import lm_eval.api.registry  # pyright: ignore[reportMissingTypeStubs]

MODEL_TYPE = "graftwork"


def register() -> None:
    """Register the model type by the path of its class, which lm-eval imports at first use."""
    # the registry of lm-eval is generic over types that are imported for type checks only
    registry: Any = lm_eval.api.registry.model_registry
    if MODEL_TYPE not in registry:
        registry.register(MODEL_TYPE, target="graftwork.pipeline.harness.model:GraftLM")
