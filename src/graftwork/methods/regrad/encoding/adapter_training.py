"""Parametric RAG: one independently trained adapter per passage, trained in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.encoding.gradients import LOCK, evaluating
from graftwork.methods.regrad.modules import flat_adapter, updated

Texts = Literal["joined", "apart", "passage"]

DECAYS, EPSILON = (0.9, 0.999), 1e-8
"""β₁, β₂ and ε of AdamW, as in torch."""


@dataclass(frozen=True, slots=True)
class AdapterTraining:
    """Training settings of the passages' adapters."""

    texts: Texts = "joined"
    """Training texts of a passage: joined (passage, question and answer in one text, and again with the rewrite in
    place of the passage, for each pair), apart (the passage, the rewrite, and each question with its answer), or
    passage (the passage only, which needs no pairs). joined is the published choice; passage is the cheapest."""
    epochs: int = 1
    """Passes over a passage's texts, in their order. More passes memorise more and cost proportionally more time."""
    learning_rate: float = 3e-4
    """Constant learning rate of AdamW. Raise it for few texts or one epoch, lower it if losses diverge."""
    texts_per_update: int = 1
    """Texts of a passage in one update. Larger values make fewer, smoother updates."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW, as in torch."""

    def __post_init__(self) -> None:
        """Validate the settings.

        Raises:
            ConfigError: If a number is out of range.
        """
        if self.texts not in ("joined", "apart", "passage"):
            raise ConfigError(f"Found texts {self.texts!r}; expected one of: joined, apart, passage.")
        for name in ("epochs", "texts_per_update"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number from 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate is {self.learning_rate}. Expected a number above 0.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay is {self.weight_decay}. Expected a number from 0.")

    def check_pairs(self, given: bool) -> None:
        """Verify that pairs are given exactly if the training texts use them.

        Raises:
            ConfigError: If pairs are missing or unused.
        """
        if given == (self.texts == "passage"):
            needed = "no pairs" if given else "a pairs file"
            raise ConfigError(
                f"Found {'a' if given else 'no'} pairs file, and texts {self.texts}, which need {needed}. Add pairs "
                "(--pairs FILE), or train on the passages only (--texts passage)."
            )

    def __str__(self) -> str:
        """Fingerprint entry of the settings."""
        return (
            f"AdamW, texts {self.texts}, epochs {self.epochs}, learning rate {self.learning_rate:g}, "
            f"texts per update {self.texts_per_update}, weight decay {self.weight_decay:g}"
        )


def trained_adapters(
    model: nn.Module, texts: Sequence[Sequence[Sequence[int]]], training: AdapterTraining
) -> tuple[Float[Tensor, "rows numbers"], Float[Tensor, " rows"]]:
    """Train one adapter per passage from the model's own adapter, and return the differences.

    Each passage p has its own adapter θ_p = θ + Δ_p and AdamW moments m, v. With the gradient g of the mean loss over
    the texts of an update, step t computes

        m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²
        Δ_p ← Δ_p − η [ (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε) + λ (θ + Δ_p) ]

    All passages share one forward and one backward pass per update, because a row's loss depends on that row's adapter
    only. The model's own adapter is unchanged.

    Source: Parametric RAG, document parameterising: next-token prediction on all of a text.
    Differs from it: many passages at once; texts keep their order.

    Args:
        model: The converted model.
        texts: Token ids of the texts of each passage, at least two tokens each.
        training: Training settings.

    Returns:
        Differences Δ between trained and shared adapter, in the order of the layout, and mean losses of the last epoch.
    """
    start = flat_adapter(model).detach()  # [numbers]
    delta, first, second = (start.new_zeros(len(texts), start.numel()) for _ in range(3))  # [passages numbers]
    taken = start.new_zeros(len(texts), 1)  # steps so far
    losses = start.new_zeros(len(texts))
    longest = max(map(len, texts), default=0)
    with LOCK, evaluating(model):
        for epoch in range(training.epochs):
            for begin in range(0, longest, training.texts_per_update):
                # passages with fewer texts pause until the next epoch
                active = [row for row, own in enumerate(texts) if begin < len(own)]
                rows = torch.tensor(active, device=start.device)  # [active]
                parts = [list(texts[row][begin : begin + training.texts_per_update]) for row in active]
                gradients, found = _gradients(model, delta[rows], parts)  # [active numbers], [active]
                taken[rows] += 1
                first[rows] = first[rows].lerp(gradients, 1 - DECAYS[0])
                second[rows] = second[rows].lerp(gradients.square(), 1 - DECAYS[1])
                mean = first[rows] / (1 - DECAYS[0] ** taken[rows])
                spread = (second[rows] / (1 - DECAYS[1] ** taken[rows])).sqrt() + EPSILON
                # the decay applies to the whole adapter, start + delta
                moved = mean / spread + training.weight_decay * (start + delta[rows])  # [active numbers]
                delta[rows] -= training.learning_rate * moved
                if epoch == training.epochs - 1:
                    counts = torch.tensor([len(part) for part in parts], device=start.device)
                    losses[rows] += found * counts
    return delta, losses / torch.tensor([len(own) for own in texts], device=start.device)


def _gradients(model: nn.Module, delta: Tensor, texts: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Gradient [passages numbers] of each passage's mean loss with respect to its delta, and losses [passages]."""
    owners = [row for row, own in enumerate(texts) for _ in own]
    flat = [torch.tensor(text) for own in texts for text in own]
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=0).to(delta.device)  # [texts tokens]
    lengths = torch.tensor([len(text) for text in flat], device=delta.device)  # [texts]
    mask = torch.arange(ids.shape[1], device=delta.device) < lengths[:, None]  # [tokens] < [texts 1] -> [texts tokens]
    of = torch.tensor(owners, device=delta.device)  # [texts]
    counts = torch.bincount(of, minlength=len(texts))  # [passages]
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        with updated(model, delta[of]):  # [texts numbers]
            # without a mask attention is purely causal; no token attends to the padding, because it is on the right
            logits = model(input_ids=ids, use_cache=False).logits  # [texts tokens vocabulary]
        own = functional.mean_token_losses(logits, functional.document_labels(ids, mask)).to(delta)  # [texts]
        losses = delta.new_zeros(len(texts)).index_add(0, of, own / counts[of])  # [passages]
        (gradients,) = torch.autograd.grad(losses.sum(), delta)
    return gradients, losses.detach()
