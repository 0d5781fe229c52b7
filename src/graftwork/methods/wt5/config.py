"""Settings of WT5: loss weights, constrained generation, and examination of answers."""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.errors import ConfigError


@dataclass(frozen=True)
class WT5Config:
    """Settings of the loss, of decoding, and of the examination of answers."""

    explanation_weight: float = 1.0
    """Weight of explanation tokens in the loss, relative to label tokens; lower it if long explanations hurt label
    accuracy."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function, (log Z)², in the loss; set 1e-4 to reproduce the authors' T5
    configuration."""
    constrained: bool = False
    """Restrict generation to labels of the task and, in extractive tasks, to contiguous spans of the source; an answer
    ends at a repeated span. Choose it if every span must be found in the source; it hides a model's copying errors."""
    probabilities: bool = False
    """Write the probability of every label with each answer; costs one decoder pass per label."""
    faithfulness: bool = False
    """Measure comprehensiveness and sufficiency of the spans of each answer; implies `probabilities`. Choose it to test
    whether labels depend on the explanations."""
    masking: bool = False
    """Replace every removed word with the first sentinel token in faithfulness, instead of deleting it; keeps the
    length of the input."""
    samples: int | None = None
    """Number of sampled answers per example for token scores (share of samples whose spans contain the token), needed
    for AUPRC; null for none."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If a weight is negative, or samples is smaller than 1.
        """
        for name in ("explanation_weight", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a number of at least 0.")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples is {self.samples}. Expected a whole number of at least 1, or null.")
