"""What is asked, what was recalled for it, and what was answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError
from graftwork.methods.regrad.text.sampling import Sampling
from graftwork.retrieval.retriever import Hit, Passage
from graftwork.tasks.multihop import LETTERS, PARSERS, Kind

if TYPE_CHECKING:
    from torch import Tensor

PASSAGES = 3
"""Passages that are recalled where nothing else is said, as published."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with how it is to be answered; the questions of one batch may differ in all of it."""

    text: str
    passages: tuple[str | Passage, ...] | None = None
    """Ids of the passages to recall, or the passages; None to retrieve them, none for none. Twice counts once."""
    count: int = PASSAGES
    """Passages to retrieve at most."""
    strength: float = 1.0
    """How far the step goes. 0 answers with the adapter as it was learned, which is not the pretrained model."""
    adapter: bool = True
    """Off answers with the pretrained model."""
    context: bool = False
    """Show the passages in the prompt as well."""
    kind: Kind = "open"
    """How the answer is worded: open, yes_no or choice."""
    choices: tuple[str, ...] = ()
    """The five candidates of a choice."""
    sampling: Sampling | None = None
    """How tokens are drawn; None takes the likeliest one every time."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            ConfigError: If the text is empty, or a number is none.
        """
        if not self.text.strip():
            raise ConfigError("Found a question without text; expected some.")
        if not math.isfinite(self.strength):
            raise ConfigError(f"Found strength {self.strength}; expected a finite number.")
        if self.count < 0:
            raise ConfigError(f"Found {self.count} passages to retrieve; expected 0 or more.")
        if self.kind not in PARSERS:
            raise ConfigError(f"Found kind {self.kind!r}; expected one of: {', '.join(PARSERS)}.")
        if (self.kind == "choice") != (len(self.choices) == len(LETTERS)):
            raise ConfigError(f"Found {len(self.choices)} choices in a question of kind {self.kind}; expected five.")

    @property
    def uses_gradients(self) -> bool:
        """Whether what is recalled changes the model at all."""
        return self.adapter and self.strength != 0.0


@dataclass(frozen=True, slots=True)
class RetrievedUpdate:
    """A question with everything that its answer depends on."""

    question: Question
    hits: tuple[Hit, ...]
    """Passages, best first; those given by their ids have rank and score of the order in which they were given."""
    used: tuple[str, ...]
    """Ids whose gradients are in the update."""
    missing: tuple[str, ...]
    """Ids that have no gradient."""
    delta: Tensor | None = field(repr=False)
    """What is added to the adapter, flat, in 32 bits; None for nothing."""
    update_norm: float
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, with what it rests on."""

    text: str
    passages: tuple[Hit, ...]
    update_norm: float
    """Length of the step that was taken; 0 if none was."""
    missing: tuple[str, ...]
    """Passages that had no gradient and were left out."""
    seconds: Mapping[str, float]
    """Of retrieving, of reading gradients, and of generating the batch that the question was in."""
    tokens: int
    """Tokens generated."""
    cancelled: bool = False
    """Whether it was broken off; the text is what there was."""
    generated: tuple[int, ...] = ()
    """The tokens themselves, without what ended them."""
    seed: int | None = None
    """What the answer was drawn with, and can be drawn with again; None if nothing was drawn."""

    def record(self) -> dict[str, Any]:
        """The answer as JSON holds it; scores of passages are rounded."""
        return {
            "prediction": self.text,
            "passages": [hit.id for hit in self.passages],
            "passage_scores": [round(hit.score, 6) for hit in self.passages],
            "missing": list(self.missing),
            "update_norm": round(self.update_norm, 6),
            "tokens": self.tokens,
            "seconds": {name: round(spent, 6) for name, spent in self.seconds.items()},
            **({} if self.seed is None else {"seed": self.seed}),
        }
