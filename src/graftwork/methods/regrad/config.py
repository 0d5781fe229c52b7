"""The settings of ReGrad: what is adapted, how far a gradient goes, what is learned, and how passages are worded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError
from graftwork.surgery.layers import parse_layers

Projection = Literal["gate", "up", "down"]
StepSizeMode = Literal["tie", "same", "full", "fix"]
PlainLoss = Literal["text", "text_and_answers", "answers"]


@dataclass(frozen=True)
class ReGradConfig:
    """Which projections carry a low-rank adapter, how its step sizes are shared, and what meta-training minimises."""

    rank: int = 16
    """Rank of the low-rank pair on each projection. A stored gradient grows in proportion."""
    lora_alpha: float | None = None
    """Scale of the low-rank product, divided by the rank; null is twice the rank, as published."""
    layers: str | None = None
    """Layer numbers that are adapted, from 0, such as "8-15"; null takes the upper half of them."""
    projections: tuple[Projection, ...] = ("gate", "up", "down")
    """Projections of the feed-forward layers that are adapted."""
    step_size_mode: StepSizeMode = "tie"
    """What a learned step size is shared over: tie (each adapter tensor has its own), same (one for all), full (one for
    each number), fix (nothing is learned)."""
    initial_step_size: float = 0.01
    """Where step sizes start, or stay with fix."""
    step_size_sign: Literal["free", "positive"] = "free"
    """free lets training make step sizes negative, as the original does; positive keeps them above 0 by a softplus."""
    b_std: float = 0.0
    """Standard deviation of the numbers that B starts with; 0, as published, starts as the pretrained model."""
    meta_order: Literal[1, 2] = 2
    """2 differentiates through the gradient step exactly; 1 takes the gradient for a constant, which is cheaper and
    learns less."""
    outer_loss: bool = True
    """Learn to answer after the gradient step; off learns without any step, and answers without one: `plain_loss`."""
    plain_loss: PlainLoss = "text"
    """What is learned with outer_loss off: the passages' text (standard continual pretraining), text_and_answers, both
    with the same weight (instruction continual pretraining), or the answers alone (fine-tuning)."""
    blind: bool = True
    """Ask without the passages in the prompt; off shows them, in training and in answering alike."""
    passages: int | None = None
    """Passages of a question that are used, the first ones; null uses all that its record has, and retrieves 3."""
    document_template: str = "{{ text }}"
    """What of a passage is differentiated, by its `title` and `text`; part of what a gradient depends on."""
    max_document_tokens: int = 1536
    """Longer passages are cut; part of what a gradient depends on."""
    prompt: str | None = None
    """Prompt family around questions (open, yes_no, choice, simple, or a YAML file); null goes by the kind of
    question."""
    answer_end: Literal["end_of_turn", "newline"] = "end_of_turn"
    """What ends an answer in training: the tokenizer's end of turn, or a newline as in the original."""
    select: tuple[str, ...] = ()
    """Augmented files of questions on which checkpoints are compared; the best one becomes the model. Empty keeps the
    last."""
    select_every: int = 1000
    """Updates between two comparisons; there is one at the end in any case."""
    select_samples: int | None = 300
    """Questions of each file that are compared on, the first ones; null for all."""
    select_by: Literal["f1", "loss"] = "f1"
    """What the best checkpoint has: the highest mean F1 over files, or the lowest mean loss of the answers."""
    select_new_tokens: int = 20
    """Tokens generated at most while comparing."""
    seed: int = 0
    """Seed of the adapter's start."""
    bank: str | None = None
    """Gradient bank that questions are answered from: a folder, or an address such as s3://bucket/bank."""
    index: str | None = None
    """Index that passages are found in, for questions that come without passages."""
    backend: Literal["embedded", "elasticsearch"] = "embedded"
    """Engine of that index."""
    strength: float = 1.0
    """How far the step at question time goes; 0 answers with the adapter as it was learned."""
    adapter: bool = True
    """Off answers with the pretrained model: closed book, or with blind off what is called RAG."""
    on_missing: Literal["error", "skip", "encode"] = "error"
    """What to do at question time about a passage without gradient: fail, answer with the rest, or encode it."""
    shifted: bool = False
    """A control: answer every question with the passages of the one before it."""
    mixed: float = 0.0
    """A control: this share of each question's passages, the last ones, is taken from the next question's first."""
    temperature: float = 0.0
    """Draw the tokens of answers at this temperature; 0 takes the likeliest one every time."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    sampling_seed: int = 0
    """What the seed of each question's draws is made of, together with the question's name."""
    in_place: bool = False
    """Write updates into the adapter and take them back, one question at a time, instead of handing them along."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: If a number is out of range, or there is nothing to adapt.
        """
        for name in ("rank", "max_document_tokens", "select_every", "select_new_tokens", "passages", "select_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}. Expected a whole number from 1.")
        if self.max_document_tokens < 2:
            raise ConfigError("max_document_tokens is 1. Expected at least 2, since one token teaches nothing.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha is {self.lora_alpha}. Expected a number above 0, or null.")
        if self.b_std < 0:
            raise ConfigError(f"b_std is {self.b_std}. Expected a number from 0.")
        if self.step_size_sign == "positive" and (self.initial_step_size <= 0 or self.step_size_mode == "fix"):
            raise ConfigError(
                f"step_size_sign is positive, initial_step_size is {self.initial_step_size} and step_size_mode is "
                f"{self.step_size_mode}. Expected a start above 0 that is learned; leave step_size_sign out."
            )
        if self.outer_loss and self.plain_loss != "text":
            raise ConfigError(
                f"plain_loss is {self.plain_loss}, and outer_loss is on, which has no part in it. Switch that off."
            )
        if not math.isfinite(self.strength):
            raise ConfigError(f"strength is {self.strength}. Expected a finite number.")
        if not 0 <= self.mixed <= 1:
            raise ConfigError(f"mixed is {self.mixed}. Expected a share from 0 to 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}. Expected a finite number from 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Expected a share above 0, up to 1.")
        if not self.projections:
            raise ConfigError("projections is empty. Expected at least one of: gate, up, down.")
        parse_layers(self.layers, "layers")

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return (2.0 * self.rank if self.lora_alpha is None else self.lora_alpha) / self.rank
