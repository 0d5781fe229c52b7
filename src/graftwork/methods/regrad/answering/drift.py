"""Drift check: answer random questions, and compare all weights with those before. See `graftwork doctor --drift`."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.in_place import WeightsChangedError
from graftwork.methods.regrad.bank.errors import MissingGradientError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.text.prompting import decoded_text
from graftwork.methods.regrad.text.requests import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THREADS = 2
STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0)
MAX_PASSAGES = 3
MAX_ROWS = 4
NEW_TOKENS = 6
ABSENT = "no passage has this id"
_OUTCOMES = {"answered": 0.7, "failed": 0.1, "broken": 0.1, "cancelled": 0.1}
"""Probabilities of batches that succeed, name an unknown passage, raise between two tokens, or are cancelled."""


class _InjectedError(Exception):
    """Error raised on purpose between two tokens."""


@dataclass(frozen=True, slots=True)
class DriftResult:
    """Result of a drift check."""

    answered: int
    failed: int
    cancelled: int
    same: bool
    """True if no weight and no buffer has changed."""

    def __str__(self) -> str:
        counts = f"{self.answered} questions answered, {self.failed} failed and {self.cancelled} cancelled on purpose"
        return f"{counts}; weights and buffers {'bit for bit the same' if self.same else 'CHANGED'}"


def check_drift(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: ReGradConfig,
    bank: GradientBank,
    count: int,
    *,
    seed: int = 0,
) -> DriftResult:
    """Answer random questions from two threads, in both modes, and compare the weights with those before.

    Questions are random words of the vocabulary, with random passages and strengths. Some batches name an unknown
    passage, some raise between two tokens, and some are cancelled.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        config: Settings of the conversion.
        bank: Gradients to answer from; must not be empty.
        count: Number of questions in each of the two modes.
        seed: Seed of the questions.

    Raises:
        ConfigError: If the bank is empty or `count` is below 1.
        FingerprintMismatchError: If the bank was encoded with another model.
    """
    ids = bank.ids()
    if not ids or count < 1:
        raise ConfigError(
            f"Found {len(ids)} passages in {bank.backend} and {count} questions to ask; expected 1 or more of each."
        )
    before: str | None = None
    totals: dict[str, int] = dict.fromkeys(("answered", "failed", "cancelled"), 0)
    for in_place in (False, True):
        answerer = Answerer(model, tokenizer, bank, config=config, in_place=in_place, batch_size=MAX_ROWS)
        before = before or answerer.weights_digest()
        batches = _batches(ids, tokenizer, count, random.Random(seed))
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for outcome, size in pool.map(partial(_run_batch, answerer), batches):
                    totals[outcome] += size
        except WeightsChangedError:
            return DriftResult(**totals, same=False)
        if answerer.weights_digest() != before:
            return DriftResult(**totals, same=False)
    return DriftResult(**totals, same=True)


@dataclass(frozen=True, slots=True)
class _Batch:
    questions: Sequence[Question]
    outcome: str
    """Key of `_OUTCOMES`."""


def _batches(ids: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int, draw: random.Random) -> list[_Batch]:
    pieces = (decoded_text(tokenizer, [token], keep_special=True).strip() for token in _tokens(tokenizer, draw))
    words = [piece for piece in pieces if piece]
    batches: list[_Batch] = []
    left = count
    while left:
        size = min(left, draw.randint(1, MAX_ROWS))
        outcome = draw.choices(list(_OUTCOMES), list(_OUTCOMES.values()))[0]
        questions = [
            Question(
                " ".join(draw.choices(words, k=draw.randint(1, 12))),
                tuple(draw.sample(ids, min(len(ids), draw.randint(0, MAX_PASSAGES)))),
                strength=draw.choice(STRENGTHS),
                adapter=draw.random() > 0.1,
            )
            for _ in range(size)
        ]
        if outcome == "failed":
            questions[-1] = Question("who ?", (ABSENT,))
        batches.append(_Batch(questions, outcome))
        left -= size
    return batches


def _tokens(tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> list[int]:
    """Random tokens of the vocabulary that are not special."""
    untyped: Any = tokenizer
    special: set[int] = set(untyped.all_special_ids)
    ordinary = [token for token in range(len(untyped)) if token not in special]
    return draw.sample(ordinary, min(200, len(ordinary)))


def _run_batch(answerer: Answerer, batch: _Batch) -> tuple[str, int]:
    """Answer a batch; return its actual outcome and its number of questions."""
    begun = threading.Event()

    def cancelled(_: int) -> bool:
        # called after the first token, when the update has been applied
        if batch.outcome == "broken":
            raise _InjectedError
        if batch.outcome == "cancelled" and begun.is_set():
            return True
        begun.set()
        return False

    size = len(batch.questions)
    try:
        answers = answerer.answer(batch.questions, max_new_tokens=NEW_TOKENS, cancelled=cancelled)
    except (MissingGradientError, _InjectedError):
        return "failed", size
    return ("cancelled" if any(one.cancelled for one in answers) else "answered"), size
