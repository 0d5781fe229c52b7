"""The settings of evaluation and prediction. Free of torch, so that the command line can read them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError
from graftwork.settings.lengths import apply_profile, sequences_per_step


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how answers are generated."""

    tasks: tuple[str, ...] = ()
    """Tasks to evaluate, by name, prepared JSON-lines files, or mixtures for all of their tasks that can be scored."""
    split: str = "dev"
    """Split to evaluate."""
    lowercase: bool = False
    """Lower-case inputs and answers; recommended for UnifiedQA checkpoints, which were trained so. The paper's tables
    were made without."""
    limit: int | None = None
    """Evaluate the first rows only, and score over that number; null for all."""
    mode: Literal["fixed", "reference"] = "fixed"
    """reference words, reads and scores tasks as their authors' code does, known defects included."""
    lengths: str | None = None
    """Length profile that sets max_input_tokens and max_new_tokens: cos_e, esnli, movie_rationales, eraser_multi_rc."""
    prompt: str | None = None
    """Word inputs of one's own as this task words its own: JSON lines with its fields, or a text for each line."""
    explain: bool | None = None
    """Ask for a reason, or for the label alone, by the word explain before an input; null leaves inputs as they are."""
    max_input_tokens: int = 512
    """Longer inputs are cut."""
    max_new_tokens: int = 19
    """Tokens generated at most; 19 is what the published tables of UnifiedQA were made with."""
    batch_size: int = 32
    """Inputs generated at once."""
    tokens_per_batch: int | None = None
    """Generate as many inputs at once as fit into this many tokens, each counted at its longest side; null for
    batch_size."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    official: bool = False
    """Use the metrics of a data set's own publisher instead of exact match and F1."""
    baseline: bool = False
    """Measure the dense model too, with the same code."""
    cost_lengths: tuple[int, ...] = ()
    """Sequence lengths at which time and memory are measured beside the dense model; empty for none."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: If a number is smaller than 1.
        """
        apply_profile(self, "max_input_tokens", "max_new_tokens")
        for name in ("limit", "max_input_tokens", "max_new_tokens", "batch_size", "tokens_per_batch", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}. Expected a whole number from 1.")
        if any(length < 1 for length in self.cost_lengths):
            raise ConfigError(f"cost_lengths is {list(self.cost_lengths)}. Expected whole numbers from 1.")

    @property
    def rows_at_once(self) -> int:
        """Inputs generated at once, by either setting."""
        if self.tokens_per_batch is None:
            return self.batch_size
        return sequences_per_step(self.tokens_per_batch, self.max_input_tokens, self.max_new_tokens)
