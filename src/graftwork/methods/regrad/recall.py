"""From a question to the update that answers it: passages found, gradients read and added up, one step."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.bank import GradientBank
from graftwork.methods.regrad.bank_errors import MissingGradientError
from graftwork.methods.regrad.encoding import PassageEncoder
from graftwork.methods.regrad.modules import step_sizes
from graftwork.methods.regrad.questions import Question, Recalled
from graftwork.retrieval.retriever import Hit, Passage, Retriever

Missing = Literal["error", "skip", "encode"]


class Recall:
    """Finds passages and reads their gradients; threads may share one.

    Args:
        encoder: The model with its settings; encodes what is missing, if asked to.
        bank: The gradients; None where no question needs any.
        retriever: Finds passages; None where questions name theirs.
        on_missing: What to do about a passage without gradient: fail, answer with the rest, or encode it now, and keep
            it if the bank can be written to.

    Raises:
        ConfigError: If `on_missing` is another word.
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
        self.encoder, self.bank, self.retriever, self.on_missing = encoder, bank, retriever, on_missing
        self.lock = threading.RLock()

    def __call__(self, questions: Sequence[Question]) -> list[Recalled]:
        """Recall for several questions; the bank is seen as it is when this is called.

        Raises:
            MissingGradientError: If a passage has no gradient and that is an error.
            ConfigError: If there is nothing to retrieve from, or no bank.
        """
        started = time.perf_counter()
        hits = self.passages(questions)
        retrieved = (time.perf_counter() - started) / max(len(questions), 1)
        with torch.no_grad(), self.lock:
            if self.bank is not None:
                self.bank.refresh()
            return [self._recalled(question, found, retrieved) for question, found in zip(questions, hits, strict=True)]

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

    def _recalled(self, question: Question, hits: tuple[Hit, ...], retrieved: float) -> Recalled:
        started = time.perf_counter()
        used: tuple[str, ...] = ()
        missing: tuple[str, ...] = ()
        delta = None
        if question.uses_gradients and hits:
            total, used, missing = self._sum({hit.id: hit for hit in hits})
            if used:
                delta = functional.update(step_sizes(self.encoder.model).cpu(), total[None], question.strength)[0]
        norm = 0.0 if delta is None else float(delta.norm())
        seconds = {"retrieve": retrieved, "gather": time.perf_counter() - started}
        return Recalled(question, hits, used, missing, delta, norm, seconds)

    def _sum(self, hits: Mapping[str, Hit]) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
        """The sum of gradients, the ids in it, and those without one."""
        if self.bank is None:
            raise ConfigError("Found no gradient bank, and a question that needs gradients. Build one, or open it.")
        there = self.bank.contains(hits)
        missing = [name for name in hits if not there[name]]
        if missing and self.on_missing == "error":
            raise MissingGradientError(missing)
        fresh: dict[str, Tensor] = {}
        if missing and self.on_missing == "encode":
            fresh = self._encoded([hits[name] for name in missing])
            missing = []
        used = [name for name in hits if name not in missing]
        stored = [name for name in used if name not in fresh]
        if not fresh:
            return self.bank.sum(dict.fromkeys(stored, 1.0)), tuple(used), tuple(missing)
        # in the order of the ids, as the bank adds, so that the order of passages changes nothing
        total = torch.zeros(self.bank.layout.size, dtype=torch.float32)
        for name in sorted(used):
            total += fresh[name] if name in fresh else self.bank.get([name])[0]
        return total, tuple(used), tuple(missing)

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


def without(recalled: Recalled, name: str, recall: Recall) -> Recalled:
    """The same question with one passage less."""
    kept = tuple(hit for hit in recalled.hits if hit.id != name)
    question = replace(recalled.question, passages=tuple(Passage(hit.id, hit.text, hit.title) for hit in kept))
    return recall([question])[0]
