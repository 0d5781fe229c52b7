"""Whether answering leaves a model as it was, seen by answering: what `graftwork doctor --drift` runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.in_place import WeightsChangedError
from graftwork.methods.regrad.bank.errors import MissingGradientError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.text.requests import Question

THREADS = 2
STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0)
MOST_PASSAGES = 3
MOST_ROWS = 4
NEW_TOKENS = 6
ABSENT = "no passage has this id"
_FATES = {"answered": 0.7, "failed": 0.1, "broken": 0.1, "cancelled": 0.1}
"""What becomes of a batch, and how often: an unknown passage, an error between two tokens, a client that hangs up."""


class _BrokenError(Exception):
    """Stands for whatever may go wrong between two tokens."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What was asked, and whether any weight or buffer moved."""

    answered: int
    failed: int
    cancelled: int
    same: bool

    def __str__(self) -> str:
        asked = f"{self.answered} questions answered, {self.failed} failed and {self.cancelled} cancelled on purpose"
        return f"{asked}; weights and buffers {'bit for bit the same' if self.same else 'CHANGED'}"


def check_drift(
    model: nn.Module, tokenizer: Any, config: ReGradConfig, bank: GradientBank, count: int, *, seed: int = 0
) -> Drift:
    """Ask a model questions of every kind from two threads, in both modes, and compare its weights with those before.

    Questions are random words of the vocabulary, with passages, their number and the step's length drawn anew for each;
    some batches name a passage that is not there, some raise between two tokens and some are given up.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        config: Its settings.
        bank: Gradients to answer from; must hold some.
        count: Questions, in each of the two modes.
        seed: Draws the questions.

    Raises:
        ConfigError: If the bank is empty or `count` is below 1.
        FingerprintMismatchError: If the bank is another model's.
    """
    ids = bank.ids()
    if not ids or count < 1:
        raise ConfigError(
            f"Found {len(ids)} passages in {bank.backend} and {count} questions to ask; expected 1 or more of each."
        )
    before: str | None = None
    totals: dict[str, int] = dict.fromkeys(("answered", "failed", "cancelled"), 0)
    for in_place in (False, True):
        answerer = Answerer(model, tokenizer, bank, config=config, in_place=in_place, batch_size=MOST_ROWS)
        before = before or answerer.weights_digest()
        batches = _batches(ids, tokenizer, count, random.Random(seed))
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for became, size in pool.map(lambda batch, one=answerer: _ask(one, *batch), batches):
                    totals[became] += size
        except WeightsChangedError:
            return Drift(**totals, same=False)
        if answerer.weights_digest() != before:
            return Drift(**totals, same=False)
    return Drift(**totals, same=True)


def _batches(ids: Sequence[str], tokenizer: Any, count: int, draw: random.Random) -> list[tuple[list[Question], str]]:
    words = [word for word in (tokenizer.decode([token]).strip() for token in _tokens(tokenizer, draw)) if word]
    batches, left = [], count
    while left:
        size = min(left, draw.randint(1, MOST_ROWS))
        fate = draw.choices(list(_FATES), list(_FATES.values()))[0]
        questions = [
            Question(
                " ".join(draw.choices(words, k=draw.randint(1, 12))),
                tuple(draw.sample(ids, min(len(ids), draw.randint(0, MOST_PASSAGES)))),
                strength=draw.choice(STRENGTHS),
                adapter=draw.random() > 0.1,
            )
            for _ in range(size)
        ]
        if fate == "failed":
            questions[-1] = Question("who ?", (ABSENT,))
        batches.append((questions, fate))
        left -= size
    return batches


def _tokens(tokenizer: Any, draw: random.Random) -> list[int]:
    special = set(tokenizer.all_special_ids)
    usual = [token for token in range(len(tokenizer)) if token not in special]
    return draw.sample(usual, min(200, len(usual)))


def _ask(answerer: Answerer, questions: Sequence[Question], fate: str) -> tuple[str, int]:
    """What became of a batch, and how many questions it had."""
    begun = threading.Event()

    def cancelled(_: int) -> bool:
        # the first token is generated, so that the update is in place
        if fate == "broken":
            raise _BrokenError
        if fate == "cancelled" and begun.is_set():
            return True
        begun.set()
        return False

    try:
        answers = answerer.answer(questions, max_new_tokens=NEW_TOKENS, cancelled=cancelled)
    except (MissingGradientError, _BrokenError):
        return "failed", len(questions)
    return ("cancelled" if any(one.cancelled for one in answers) else "answered"), len(questions)
