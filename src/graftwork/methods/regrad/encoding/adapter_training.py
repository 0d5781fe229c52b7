"""Parametric RAG: an adapter for each passage, trained by itself, many of them at once."""

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
"""Those of AdamW in torch."""


@dataclass(frozen=True, slots=True)
class AdapterTraining:
    """How every passage's adapter is trained."""

    texts: Texts = "joined"
    """joined has passage, question and answer in one text, and once more with the rewrite in the
    passage's place, for each pair. apart has the passage, the rewrite, and each question, asked blindly, with its
    answer. passage has the passage alone and needs no pairs."""
    epochs: int = 1
    """Passes over a passage's texts, in their order."""
    learning_rate: float = 3e-4
    """Rate of AdamW; it stays as it is."""
    texts_per_update: int = 1
    """Texts of a passage that make one update."""
    weight_decay: float = 0.01
    """Decay of AdamW, as torch has it."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

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
        """See that there are pairs where the texts are made of them, and none where they would do nothing.

        Raises:
            ConfigError: If it is the other way round.
        """
        if given == (self.texts == "passage"):
            needed = "no pairs" if given else "a pairs file"
            raise ConfigError(
                f"Found {'a' if given else 'no'} pairs file, and texts {self.texts}, which need {needed}. Give pairs "
                "(--pairs FILE), or train on the passages alone (--texts passage)."
            )

    def __str__(self) -> str:
        """What trained adapters depend on, for fingerprints."""
        return (
            f"AdamW, texts {self.texts}, epochs {self.epochs}, learning rate {self.learning_rate:g}, "
            f"texts per update {self.texts_per_update}, weight decay {self.weight_decay:g}"
        )


def trained_adapters(
    model: nn.Module, texts: Sequence[Sequence[Sequence[int]]], training: AdapterTraining
) -> tuple[Float[Tensor, "rows numbers"], Float[Tensor, " rows"]]:
    """What training changes in the adapter, for every passage by itself; the model's own adapter stays as it is.

    Each passage has an adapter and AdamW's moments of its own and begins where the model's adapter is. An update of all
    passages is one forward and one backward pass: a row's loss depends on nothing but that row's adapter. The loss is
    the mean over a text's tokens, and over the texts of an update.

    Source: Parametric RAG, document parameterising: next-token prediction on all of a text.
    Differs from it: many passages at once; texts keep their order.

    Args:
        model: The converted model.
        texts: For each passage the tokens of its texts, at least two each.
        training: The settings.

    Returns:
        Differences between trained and common adapter, in the order of the layout, and mean losses of the last epoch.
    """
    start = flat_adapter(model).detach()
    delta, first, second = (start.new_zeros(len(texts), start.numel()) for _ in range(3))
    taken = start.new_zeros(len(texts), 1)
    losses = start.new_zeros(len(texts))
    longest = max(map(len, texts), default=0)
    with LOCK, evaluating(model):
        for epoch in range(training.epochs):
            for begin in range(0, longest, training.texts_per_update):
                # one with fewer texts waits for the next epoch
                rows = torch.tensor([row for row, own in enumerate(texts) if begin < len(own)], device=start.device)
                parts = [list(texts[row][begin : begin + training.texts_per_update]) for row in rows.tolist()]
                gradients, found = _gradients(model, delta[rows], parts)
                taken[rows] += 1
                first[rows] = first[rows].lerp(gradients, 1 - DECAYS[0])
                second[rows] = second[rows].lerp(gradients.square(), 1 - DECAYS[1])
                mean = first[rows] / (1 - DECAYS[0] ** taken[rows])
                spread = (second[rows] / (1 - DECAYS[1] ** taken[rows])).sqrt() + EPSILON
                # the decay is of the whole adapter, of which delta is the changed part
                moved = mean / spread + training.weight_decay * (start + delta[rows])
                delta[rows] -= training.learning_rate * moved
                if epoch == training.epochs - 1:
                    counts = torch.tensor([len(part) for part in parts], device=start.device)
                    losses[rows] += found * counts
    return delta, losses / torch.tensor([len(own) for own in texts], device=start.device)


def _gradients(model: nn.Module, delta: Tensor, texts: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """The gradient of every row's mean loss with respect to its own displacement, and the losses."""
    owners = [row for row, own in enumerate(texts) for _ in own]
    flat = [torch.tensor(text) for own in texts for text in own]
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=0).to(delta.device)
    lengths = torch.tensor([len(text) for text in flat], device=delta.device)
    mask = torch.arange(ids.shape[1], device=delta.device) < lengths[:, None]
    of = torch.tensor(owners, device=delta.device)
    counts = torch.bincount(of, minlength=len(texts))
    with torch.enable_grad():
        delta = delta.detach().requires_grad_()
        with updated(model, delta[of]):
            # without a mask attention is plainly causal; no token sees the padding, because it stands behind
            logits = model(input_ids=ids, use_cache=False).logits
        own = functional.mean_token_losses(logits, functional.document_labels(ids, mask)).to(delta)
        losses = delta.new_zeros(len(texts)).index_add(0, of, own / counts[of])
        (gradients,) = torch.autograd.grad(losses.sum(), delta)
    return gradients, losses.detach()
