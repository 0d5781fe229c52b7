"""Questions, the updates retrieved for them, and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError
from graftwork.evaluation.sampling import Sampling
from graftwork.retrieval.retriever import Hit, Passage
from graftwork.tasks.multihop import LETTERS, PARSERS, Kind

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PASSAGES = 3
"""Default number of passages to retrieve, as published."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its options; questions of one batch may differ in all of them."""

    text: str
    passages: tuple[str | Passage, ...] | None = None
    """Passages, or their ids; None retrieves passages, an empty tuple uses none. Duplicates count once."""
    count: int = PASSAGES
    """Maximum number of passages to retrieve."""
    strength: float = 1.0
    """Factor of the gradient step; 0 answers with the trained adapter alone, which is not the pretrained model."""
    adapter: bool = True
    """False answers with the pretrained model."""
    context: bool = False
    """True puts the passages into the prompt as well."""
    kind: Kind = "open"
    """Kind of question: open, yes_no or choice; selects the prompt family."""
    choices: tuple[str, ...] = ()
    """The five options of a question of kind choice."""
    sampling: Sampling | None = None
    """Sampling of tokens; None for greedy decoding."""
    system: str | None = None
    """System prompt in place of the one of the prompt family; None for that one."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of the conversation, as (role, text) with the roles user and assistant."""
    verbatim: bool = False
    """True makes the text the whole prompt; the answer is its continuation and does not end at a line feed."""

    def __post_init__(self) -> None:
        """Validate the question.

        Raises:
            ConfigError: If the text is empty, a number is out of range, or choices and kind do not match.
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
        if self.verbatim and (self.kind != "open" or self.system is not None or self.history):
            raise ConfigError(
                "Found a verbatim prompt with choices, a system prompt or earlier turns; expected a prompt alone. "
                "Write them into the text."
            )
        if unknown := {role for role, _ in self.history} - {"user", "assistant"}:
            raise ConfigError(f"Found the role {min(unknown)!r} in earlier turns; expected user or assistant.")

    @property
    def uses_gradients(self) -> bool:
        """True if gradients of passages change the model for this question."""
        return self.adapter and self.strength != 0.0


@dataclass(frozen=True, slots=True)
class RetrievedUpdate:
    """A question with its passages and the update of the adapter: everything that its answer depends on."""

    question: Question
    hits: tuple[Hit, ...]
    """Passages, best first; passages given by id have rank in the given order and score 0."""
    used: tuple[str, ...]
    """Ids whose gradients are in the update."""
    missing: tuple[str, ...]
    """Ids without a gradient."""
    delta: Float[Tensor, " numbers"] | None = field(repr=False)
    """Flat update that is added to the adapter, in float32; None for no update."""
    update_norm: float
    """Euclidean norm of `delta`; 0 without an update."""
    seconds: Mapping[str, float]
    """Time per question: `retrieve` (passages) and `gather` (gradients)."""


@dataclass(frozen=True, slots=True)
class TokenProbability:
    """Log-probability of a generated token, and the most likely tokens in its place."""

    token: int
    """Token id."""
    logprob: float
    """Natural logarithm of the token's probability under the updated model, before temperature and filters."""
    top: tuple[tuple[int, float], ...] = ()
    """Token id and log-probability of the most likely tokens, best first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer with its passages and measurements."""

    text: str
    passages: tuple[Hit, ...]
    update_norm: float
    """Euclidean norm of the update; 0 without one."""
    missing: tuple[str, ...]
    """Ids of passages that were left out because they have no gradient."""
    seconds: Mapping[str, float]
    """Time of `retrieve`, `gather`, and `generate`: from the start of the prompt to the last token; for answers that
    were generated as one batch, that of the batch."""
    tokens: int
    """Number of generated tokens."""
    cancelled: bool = False
    """True if generation was cancelled; the text is incomplete."""
    generated: tuple[int, ...] = ()
    """Generated tokens without special tokens."""
    seed: int | None = None
    """Sampling seed, which reproduces the answer; None for greedy decoding."""
    probabilities: tuple[TokenProbability, ...] = ()
    """One entry for each generated token, special tokens included; empty unless they were requested."""

    def record(self) -> dict[str, Any]:
        """Return the answer's JSON fields; scores and times are rounded."""
        return {
            "prediction": self.text,
            "passages": [hit.id for hit in self.passages],
            "passage_scores": [round(hit.score, 6) for hit in self.passages],
            "documents": [hit.document for hit in self.passages],
            "missing": list(self.missing),
            "update_norm": round(self.update_norm, 6),
            "tokens": self.tokens,
            "seconds": {name: round(spent, 6) for name, spent in self.seconds.items()},
            **({} if self.seed is None else {"seed": self.seed}),
        }
