"""Loss and accuracy of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.packing import forward


def score_batch(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Loss of a batch, and accuracy in % where the model tells classes apart.

    Args:
        model: The model.
        batch: What it takes, labels included.
        options: Further arguments of the model.

    Returns:
        The numbers by name, and what the model returned.
    """
    outputs: Any = forward(model, {**batch, **options})
    values = {"loss": outputs.loss.detach()}
    if is_classifier(pretrained(model)):
        values["accuracy"] = 100 * (outputs.logits.argmax(-1) == batch["labels"]).float().mean()
    return values, outputs
