"""Token sampling with a temperature and a seed per row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graftwork.errors import ConfigError

SEEDS = 1 << 63
"""Number of seeds: a seed is a whole number in 0 … SEEDS − 1."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters of token sampling."""

    temperature: float
    """Divisor of the logits; lower values prefer likely tokens."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with this total probability."""
    seed: int = 0
    """Seed of the row; the same seed gives the same answer, independent of the other rows in the batch."""
    top_k: int | None = None
    """Sample from this many most likely tokens; None from all."""

    def __post_init__(self) -> None:
        """Validate the parameters.

        Raises:
            ConfigError: If a number is out of range.
        """
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"temperature is {self.temperature}. Expected a finite number above 0; 0 means greedy decoding."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Expected a share above 0, up to 1.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}. Expected a whole number from 1, or null for all tokens.")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed is {self.seed}. Expected a whole number from 0 below {SEEDS}.")


def derive_seed(seed: int, name: str) -> int:
    """Return a question's seed: a hash of the common seed and the question's name."""
    return int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") % SEEDS


class TokenSampler:
    """Logits processor that makes greedy search sample: it adds Gumbel noise to the logits of sampled rows.

    With logits z, temperature T and independent u_i ~ U(0, 1), argmax_i (z_i / T − log(−log u_i)) is a sample from
    softmax(z / T). Rows without sampling keep their logits, so that greedy and sampled rows share a batch.

    Args:
        rows: Sampling of each row; None for greedy decoding.
    """

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self.rows = {number: one for number, one in enumerate(rows) if one is not None}
        # CPU generators, because seeds give other numbers on other devices
        self._noise = {number: torch.Generator().manual_seed(one.seed) for number, one in self.rows.items()}

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Return the logits of the next token, with noise in the sampled rows."""
        changed = scores.clone()  # [rows vocabulary]
        for number, one in self.rows.items():
            logits = scores[number].to("cpu", torch.float64) / one.temperature  # [vocabulary]
            uniform = torch.rand(len(logits), generator=self._noise[number], dtype=torch.float64)
            likely = top_p_filter(top_k_filter(logits, one.top_k), one.top_p)
            noisy = likely - (-uniform.log()).log()
            changed[number] = noisy.to(scores)
        return changed


def top_k_filter(logits: Float[Tensor, " vocabulary"], top_k: int | None) -> Float[Tensor, " vocabulary"]:
    """Set all logits to minus infinity but the `top_k` largest; of equal ones, those of lower token ids are kept."""
    if top_k is None or top_k >= len(logits):
        return logits
    dropped = logits.argsort(descending=True, stable=True)[top_k:]
    return logits.index_fill(0, dropped, -math.inf)


def top_p_filter(logits: Float[Tensor, " vocabulary"], top_p: float) -> Float[Tensor, " vocabulary"]:
    """Set all logits to minus infinity but those of the fewest tokens with total probability of at least `top_p`."""
    if top_p >= 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True)
    # a token is dropped if the more likely ones reach top_p without it; the most likely token is always kept
    dropped = order[probabilities.cumsum(-1) - probabilities >= top_p]
    return logits.index_fill(0, dropped, -math.inf)
