"""From a question to the update that answers it: passages found, gradients read and added up, one step."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.bank.errors import MissingGradientError
from graftwork.methods.regrad.bank.files import TRAINED_ADAPTER
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.modules import step_sizes
from graftwork.methods.regrad.text.requests import Question, RetrievedUpdate
from graftwork.retrieval.retriever import Hit, Passage, Retriever

if TYPE_CHECKING:
    from graftwork.methods.regrad.config import ReGradConfig

Missing = Literal["error", "skip", "encode"]

READ_BYTES = 256 << 20
"""Most that is read from a bank at once."""


@dataclass(frozen=True, slots=True)
class GradientSum:
    """The gradients of one question's passages."""

    total: Tensor | None
    """Their sum; None for nothing."""
    used: tuple[str, ...]
    missing: tuple[str, ...]


class GradientRetriever:
    """Finds passages and reads their gradients; threads may share one.

    Args:
        encoder: The model with its settings; encodes what is missing, if asked to.
        bank: The gradients; None where no question needs any.
        retriever: Finds passages; None where questions name theirs.
        on_missing: What to do about a passage without gradient: fail, answer with the rest, or encode it now, and keep
            it if the bank can be written to.

    Raises:
        ConfigError: If `on_missing` is another word.
        FingerprintMismatchError: If passages are to be encoded, and the bank's records are not what the encoder makes.
    """

    def __init__(
        self,
        encoder: PassageEncoder,
        bank: GradientBank | None,
        retriever: Retriever | None,
        on_missing: Missing = "error",
    ) -> None:
        if on_missing not in get_args(Missing):
            raise ConfigError(f"Found on_missing {on_missing!r}; expected one of: {', '.join(get_args(Missing))}.")
        if bank is not None and on_missing == "encode":
            encoder.check_adds(bank)
        self.encoder, self.bank, self.retriever, self.on_missing = encoder, bank, retriever, on_missing
        self.lock = threading.RLock()

    def retrieve(self, questions: Sequence[Question]) -> list[RetrievedUpdate]:
        """GradientRetriever for several questions; the bank is seen as it is when this is called.

        Raises:
            MissingGradientError: If a passage has no gradient and that is an error.
            ConfigError: If there is nothing to retrieve from, or no bank.
        """
        started = time.perf_counter()
        hits = self.passages(questions)
        retrieved = (time.perf_counter() - started) / max(len(questions), 1)
        wanted = [
            {hit.id: hit for hit in found} if question.uses_gradients else {}
            for question, found in zip(questions, hits, strict=True)
        ]
        with torch.no_grad(), self.lock:
            started = time.perf_counter()
            if self.bank is not None:
                self.bank.refresh()
            sums = self._sums(wanted)
            steps = None if stores_adapters(self.bank) else step_sizes(self.encoder.model).cpu()
            gathered = (time.perf_counter() - started) / max(len(questions), 1)
            seconds = {"retrieve": retrieved, "gather": gathered}
            return [
                _retrieved_update(question, found, one, steps, seconds)
                for question, found, one in zip(questions, hits, sums, strict=True)
            ]

    def passages(self, questions: Sequence[Question]) -> list[tuple[Hit, ...]]:
        """The passages of each question, given or retrieved."""
        found: list[tuple[Hit, ...]] = [()] * len(questions)
        by_count: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            if question.passages is not None:
                found[number] = self._named(question.passages)
            elif question.count:
                by_count.setdefault(question.count, []).append(number)
        for count, numbers in by_count.items():
            if self.retriever is None:
                raise ConfigError(
                    "Found no index to retrieve passages from, and a question that names none. Open one, or give ids."
                )
            texts = [questions[number].text for number in numbers]
            with self.lock:
                results = self.retriever.search(texts, count)
            for number, hits in zip(numbers, results, strict=True):
                found[number] = tuple(hits)
        return found

    def _named(self, passages: Sequence[str | Passage]) -> tuple[Hit, ...]:
        given = {one if isinstance(one, str) else one.id: one for one in passages}
        unknown = [name for name, one in given.items() if isinstance(one, str)]
        texts: Mapping[str, Passage] = {one.id: one for one in given.values() if isinstance(one, Passage)}
        look_up = getattr(self.retriever, "passages", None)
        if unknown and look_up is not None:
            with self.lock:
                texts = {**texts, **look_up(unknown)}
        blank = Passage("", "")
        return tuple(
            Hit(name, texts.get(name, blank).title, texts.get(name, blank).text, 0.0, rank)
            for rank, name in enumerate(given)
        )

    def _sums(self, wanted: Sequence[Mapping[str, Hit]]) -> list[GradientSum]:
        """For each question the sum of gradients, the ids in it, and those without one."""
        everything = {name: hit for hits in wanted for name, hit in hits.items()}
        if not everything:
            return [GradientSum(None, (), ())] * len(wanted)
        if self.bank is None:
            raise ConfigError("Found no gradient bank, and a question that needs gradients. Build one, or open it.")
        there = self.bank.contains(everything)
        absent = [name for name in everything if not there[name]]
        if absent and self.on_missing == "error":
            raise MissingGradientError(absent)
        fresh: dict[str, Tensor] = {}
        if absent and self.on_missing == "encode":
            fresh = self._encoded([everything[name] for name in absent])
            absent = []
        used = [tuple(name for name in hits if name not in absent) for hits in wanted]
        totals = self._added(used, fresh)
        return [
            GradientSum(total if names else None, names, tuple(name for name in hits if name in absent))
            for hits, names, total in zip(wanted, used, totals, strict=True)
        ]

    def _added(self, used: Sequence[Sequence[str]], fresh: Mapping[str, Tensor]) -> list[Tensor]:
        """The sum of each set of gradients; sets are read together, as long as there is room for them."""
        bank = self.bank
        if bank is None:
            return []
        if fresh:
            # in the order of the ids, as the bank adds, so that the order of passages changes nothing
            blank = torch.zeros(bank.layout.size)
            return [
                sum((fresh[name] if name in fresh else bank.get([name])[0] for name in sorted(names)), blank)
                for names in used
            ]
        most = max(1, max(len(names) for names in used)) * bank.manifest.stride
        together = max(1, READ_BYTES // most)
        totals: list[Tensor] = []
        for start in range(0, len(used), together):
            totals += bank.sums([dict.fromkeys(names, 1.0) for names in used[start : start + together]])
        return totals

    def _encoded(self, hits: Sequence[Hit]) -> dict[str, Tensor]:
        """Gradients of passages that the bank lacks; none of them once they are in the bank."""
        unknown = [hit.id for hit in hits if not hit.text]
        if unknown or self.bank is None:
            raise MissingGradientError(unknown)
        gradients = self.encoder.encode([Passage(hit.id, hit.text, hit.title) for hit in hits])
        if self.bank.mode == "a":
            self.bank.append(gradients)
            return {}
        return {one.id: torch.as_tensor(one.values) for one in gradients}


def stores_adapters(bank: GradientBank | None) -> bool:
    """Whether a bank's records are trained adapters, which are added without any step size."""
    return bank is not None and bank.manifest.record == TRAINED_ADAPTER


def default_strength(config: ReGradConfig, bank: GradientBank | None) -> float:
    """How far the step goes where a question does not say: the learned text of continual pretraining needs none."""
    return config.strength if config.outer_loss or stores_adapters(bank) else 0.0


def _retrieved_update(
    question: Question, hits: tuple[Hit, ...], summed: GradientSum, steps: Tensor | None, seconds: Mapping[str, float]
) -> RetrievedUpdate:
    delta, norm = None, 0.0
    if summed.total is not None:
        # trained adapters hold what is added as it is
        delta = (
            functional.update(steps, summed.total[None], question.strength)[0]
            if steps is not None
            else question.strength * summed.total
        )
        norm = float(delta.norm())
    return RetrievedUpdate(question, hits, summed.used, summed.missing, delta, norm, seconds)


def without(recalled: RetrievedUpdate, name: str, retriever: GradientRetriever) -> RetrievedUpdate:
    """The same question with one passage less."""
    kept = tuple(hit for hit in recalled.hits if hit.id != name)
    question = replace(recalled.question, passages=tuple(Passage(hit.id, hit.text, hit.title) for hit in kept))
    return retriever.retrieve([question])[0]
