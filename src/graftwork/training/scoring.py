"""Loss and accuracy of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.training.packing import forward


def score_batch(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Compute the loss of a batch and, for a classifier, the accuracy in %.

    accuracy = 100 / B · Σ [argmax logits_b = label_b]

    Args:
        model: Model to score.
        batch: Inputs and labels.
        options: Further arguments of the forward pass.

    Returns:
        The metrics by name, and the outputs of the model.
    """
    outputs: Any = forward(model, {**batch, **options})
    values = {"loss": outputs.loss.detach()}
    if is_classifier(pretrained(model)):
        # logits [batch classes], labels [batch]
        values["accuracy"] = 100 * (outputs.logits.argmax(-1) == batch["labels"]).float().mean()
    return values, outputs
