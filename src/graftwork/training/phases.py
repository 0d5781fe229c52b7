"""Phases that more than one method uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from graftwork.method import Phase
from graftwork.training.packing import forward


class Finetune(Phase):
    """Train all trainable weights on the model's own loss."""

    name: ClassVar[str] = "finetune"

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The loss that the model computes for labels, averaged over the tokens of the batch."""
        return {"loss": forward(model, batch).loss}
