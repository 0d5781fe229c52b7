"""Settings of WT5: order of label and explanation, loss weights, constrained generation, examination of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError


@dataclass(frozen=True)
class WT5Config:
    """Settings of the loss, of decoding, and of the examination of answers."""

    explanation_order: Literal["label_first", "reason_first", "separate"] = "label_first"
    """label_first generates the label, then its explanation, as in the paper; reason_first the explanation, then the
    label. separate trains two prompts, one for the label and one for the explanation (distilling step by step): an
    answer is the label alone, unless `explain` asks for an explanation."""
    alpha: float | None = None
    """Weight of the label prompt's loss with separate: alpha · label loss + (1 − alpha) · explanation loss; null is
    0.5."""
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
    consistency: bool = False
    """Also predict labels without an explanation, and report the share that equals those with one; costs a second
    generation. It shows whether asking for an explanation changes the label."""
    simulatability: bool = False
    """Leakage-adjusted simulatability: train a small simulator on the answers, and report whether explanations help it
    to predict the labels, apart from naming them. Needs one set of labels and some hundred answers."""
    bertscore: str | None = None
    """Folder of an encoder for the BERTScore of free-text explanations; needs the extra bertscore. null for none."""
    samples: int | None = None
    """Number of sampled answers per example for token scores (share of samples whose spans contain the token), needed
    for AUPRC; null for none."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If a weight is out of range, samples is smaller than 1, or a setting has no effect in this
                order.
        """
        if self.explanation_order == "separate":
            if self.explanation_weight != 1:
                raise ConfigError(
                    f"explanation_weight is {self.explanation_weight}, which has no effect with explanation_order "
                    "separate: its two losses are weighted by alpha. Set alpha, or leave it out."
                )
        elif self.alpha is not None:
            raise ConfigError(
                f"alpha is {self.alpha}, which has an effect with explanation_order separate only. Expected null with "
                f"{self.explanation_order}; set explanation_weight instead, or leave it out."
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}. Expected a number from 0 to 1, or null.")
        for name in ("explanation_weight", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a number of at least 0.")
        if self.consistency and self.explanation_order == "separate":
            raise ConfigError(
                "consistency is on, which has no effect with explanation_order separate: the label never depends on "
                "the request for an explanation. Leave it out."
            )
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"samples is {self.samples}. Expected a whole number of at least 1, or null.")
