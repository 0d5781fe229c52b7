"""Tokens drawn at random, each row of a batch with a temperature and a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import ConfigError

SEEDS = 1 << 63
"""Seeds are whole numbers from 0 below this."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, where the likeliest one is not simply taken."""

    temperature: float
    """What scores are divided by; the smaller, the more often the likeliest token is drawn."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """The same seed gives the same answer, whichever rows share the batch."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from.

        Raises:
            ConfigError: If a number is out of range.
        """
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature is {self.temperature}. Expected a finite number above 0; 0 draws nothing.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Expected a share above 0, up to 1.")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed is {self.seed}. Expected a whole number from 0 below {SEEDS}.")


def derive_seed(seed: int, name: str) -> int:
    """A seed for one question of many, which depends on nothing but the common seed and the question's name."""
    return int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") % SEEDS


class TokenSampler:
    """Changes scores so that the highest one is a token drawn at random; a row without sampling keeps its scores.

    A score plus Gumbel noise is highest with the probability that the softmax gives it, so that rows that draw and rows
    that take the likeliest token go through the same greedy search, together.

    Args:
        rows: How each row of the batch draws.
    """

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self.rows = {number: one for number, one in enumerate(rows) if one is not None}
        # on the processor, whatever device the model is on: a seed then means the same everywhere
        self._noise = {number: torch.Generator().manual_seed(one.seed) for number, one in self.rows.items()}

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocabulary"]) -> Tensor:
        """The scores of the next token of every row, changed."""
        changed = scores.clone()
        for number, one in self.rows.items():
            logits = scores[number].to("cpu", torch.float64) / one.temperature
            uniform = torch.rand(len(logits), generator=self._noise[number], dtype=torch.float64)
            drawn = top_p_filter(logits, one.top_p) - (-uniform.log()).log()
            changed[number] = drawn.to(scores)
        return changed


def top_p_filter(logits: Float[Tensor, " vocabulary"], share: float) -> Tensor:
    """The logits of the fewest tokens that together have at least this probability; minus infinity for the others."""
    if share >= 1:
        return logits
    chances, order = logits.softmax(-1).sort(descending=True)
    # what the likelier ones have without it: the first one always stays
    out = order[chances.cumsum(-1) - chances >= share]
    return logits.index_fill(0, out, -math.inf)
