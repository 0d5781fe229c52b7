"""The settings of models that explain their predictions."""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.errors import ConfigError


@dataclass(frozen=True)
class WT5Config:
    """How the loss is weighted in training, and how answers are decoded and examined."""

    explanation_weight: float = 1.0
    """Weight of a reason's tokens in the loss; a label's tokens have weight 1."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in the loss; the authors' T5 configuration has 1e-4."""
    constrained: bool = False
    """Generate only a label of the task, and in extractive tasks only contiguous spans of the source as reasons; an
    answer ends at a span that it has given before."""
    probabilities: bool = False
    """Score every label of the task and write its probability beside each answer."""
    faithfulness: bool = False
    """Measure comprehensiveness and sufficiency of each answer's spans; switches probabilities on."""
    masking: bool = False
    """Remove a span for faithfulness by the first sentinel token in place of each word, instead of deleting it."""
    samples: int | None = None
    """Sampled answers from which a score for every token of the source is made, for AUPRC; null for none."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: If a weight is negative, or samples is smaller than 1.
        """
        for name in ("explanation_weight", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a number of at least 0.")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples is {self.samples}. Expected a whole number from 1, or null for off.")
