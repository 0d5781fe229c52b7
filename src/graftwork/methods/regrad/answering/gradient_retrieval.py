"""Gradient retrieval: find the passages of a question, sum their gradients, and compute the update."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.bank.changes import is_running
from graftwork.methods.regrad.bank.errors import BankCorruptionError, MissingGradientError
from graftwork.methods.regrad.bank.files import TRAINED_ADAPTER
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.modules import adapters, step_sizes
from graftwork.methods.regrad.text.requests import Question, RetrievedUpdate
from graftwork.retrieval.retriever import DamagedIndexError, Hit, IncompleteIndexError, Passage, Retriever

if TYPE_CHECKING:
    from graftwork.methods.regrad.config import ReGradConfig

Missing = Literal["error", "skip", "encode"]

READ_BYTES = 256 << 20
"""Maximum number of bytes read from a bank in one call."""
_ATTEMPTS, _PAUSE = 50, 0.02
"""Number of retrievals while other processes change bank and index, and seconds between them."""


@dataclass(frozen=True, slots=True)
class GradientSum:
    """Sum of the gradients of one question's passages."""

    total: Float[Tensor, " numbers"] | None
    """The sum; None if no passage is used."""
    used: tuple[str, ...]
    """Ids of the passages in the sum."""
    missing: tuple[str, ...]
    """Ids of passages without a gradient."""


class GradientRetriever:
    """Retrieves passages and their gradients for questions. Thread-safe.

    The update of a question with passages D is Δ = −γ · α ⊙ Σ_{d ∈ D} g_d, with strength γ, step sizes α and stored
    gradients g_d. A bank of trained adapters stores differences instead of gradients: Δ = γ · Σ_d δ_d.

    Args:
        encoder: The model with its settings; encodes missing passages with `on_missing="encode"`.
        bank: The gradients; None if no question needs gradients.
        retriever: Passage retriever; None if all questions name their passages.
        on_missing: Handling of passages without a gradient. error: raise if a question names the passage, and leave
            it out if it was retrieved, since a bank may be a working set of a larger index. skip: leave it out.
            encode: compute the gradient from the passage's text, and store it if the bank is writable.

    Raises:
        ConfigError: If `on_missing` has another value.
        FingerprintMismatchError: If `on_missing` is encode, and the encoder produces another kind of record than the
            bank contains.
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
        self.encoder, self.bank, self.retriever = encoder, bank, retriever
        self.on_missing: Missing = on_missing
        self.lock = threading.RLock()
        self._steps: tuple[list[tuple[int, int, int]], Tensor] | None = None

    def refresh(self) -> bool:
        """Move bank and index to the newest state of both. Return True if one of them moved.

        The bank is first: a passage is deleted from the index first and added to it last, so that the index never
        contains a passage that a newer state of the bank has lost.
        """
        with self.lock:
            moved = self.bank is not None and self.bank.refresh()
            refresh = getattr(self.retriever, "refresh", None)
            return bool(refresh is not None and refresh()) or moved

    def retrieve(self, questions: Sequence[Question]) -> list[RetrievedUpdate]:
        """Return the update of each question, from one state of bank and index: the newest at the time of the call.

        A retrieval during a change by another process is repeated.

        Raises:
            MissingGradientError: If a question names a passage without a gradient and `on_missing` is error.
            ConfigError: If a question needs an index or a bank and there is none.
        """
        with self.lock, nullcontext() if self.bank is None else self.bank.pinned():
            self.refresh()
            for attempt in range(_ATTEMPTS):
                last = attempt + 1 == _ATTEMPTS
                try:
                    if (found := self._retrieve(questions, torn=last)) is not None:
                        return found
                except (MissingGradientError, BankCorruptionError, DamagedIndexError, IncompleteIndexError):
                    # its files may have been removed by another process
                    if last or not self.refresh():
                        raise
                    continue
                if not self.refresh():
                    time.sleep(_PAUSE)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _retrieve(self, questions: Sequence[Question], *, torn: bool) -> list[RetrievedUpdate] | None:
        """The updates from the open states; None if the two differ by an unfinished change, unless `torn` is set."""
        started = time.perf_counter()
        hits = self.passages(questions)
        searched = (time.perf_counter() - started) / max(len(questions), 1)
        needed = [
            {hit.id: hit for hit in found} if question.uses_gradients else {}
            for question, found in zip(questions, hits, strict=True)
        ]
        passages = {name: hit for own in needed for name, hit in own.items()}
        named = {name for question in questions if question.passages is not None for name in _ids(question.passages)}
        keys = {} if self.bank is None else self.bank.keys(list(passages))
        retrieved = [hit for name, hit in passages.items() if name not in named]
        if not torn and self.bank is not None and self._differ(self.bank, retrieved, keys):
            return None
        with torch.no_grad():
            started = time.perf_counter()
            sums = self._sums(needed, named, keys)
            steps = None if stores_adapters(self.bank) else self._step_sizes()
            gathered = (time.perf_counter() - started) / max(len(questions), 1)
            seconds = {"retrieve": searched, "gather": gathered}
            return [
                _retrieved_update(question, _without_missing(question, found, one), one, steps, seconds)
                for question, found, one in zip(questions, hits, sums, strict=True)
            ]

    def _step_sizes(self) -> Tensor:
        """Step sizes [numbers] on the CPU, copied again only after a change of their parameters."""
        # changes of a parameter in place raise its version
        parts: list[Any] = [
            part
            for adapter in adapters(self.encoder.model).values()
            for name, part in adapter.named_parameters(recurse=False)
            if name.startswith("step_size")
        ]
        state = [(id(part), part.data_ptr(), part._version) for part in parts]
        if self._steps is None or self._steps[0] != state:
            self._steps = (state, step_sizes(self.encoder.model).cpu())
        return self._steps[1]

    def _differ(self, bank: GradientBank, retrieved: Sequence[Hit], keys: Mapping[str, str]) -> bool:
        """True if a retrieved passage has no gradient or that of another text, and another process changes the two."""
        expected = self.encoder.keyed([Passage(hit.id, hit.text, hit.title) for hit in retrieved])
        if stores_adapters(bank):
            same = all(name in keys for name in expected)
        else:
            same = all(keys.get(name) == key for name, (_, key) in expected.items())
        return not same and (self.refresh() or is_running(self.retriever))

    def without(self, update: RetrievedUpdate, id: str) -> RetrievedUpdate:
        """Return the update of the same question without one of its passages."""
        kept = tuple(hit for hit in update.hits if hit.id != id)
        question = replace(update.question, passages=tuple(Passage(hit.id, hit.text, hit.title) for hit in kept))
        return self.retrieve([question])[0]

    def passages(self, questions: Sequence[Question]) -> list[tuple[Hit, ...]]:
        """Return the passages of each question, given or retrieved."""
        found: list[tuple[Hit, ...]] = [()] * len(questions)
        by_count: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            if question.passages is not None:
                found[number] = self._given(question.passages)
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

    def _given(self, passages: Sequence[str | Passage]) -> tuple[Hit, ...]:
        """Hits of given passages; the texts of ids are looked up in the index, if there is one."""
        given = dict(zip(_ids(passages), passages, strict=True))
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

    def _sums(self, needed: Sequence[Mapping[str, Hit]], named: Set[str], keys: dict[str, str]) -> list[GradientSum]:
        """The sum of gradients of each question, the ids in it, and the ids without a gradient.

        Args:
            needed: Passages of each question.
            named: Ids that questions name.
            keys: Id to key of those passages that have a gradient.
        """
        passages = {name: hit for hits in needed for name, hit in hits.items()}
        if not passages:
            return [GradientSum(None, (), ())] * len(needed)
        if self.bank is None:
            raise ConfigError("Found no gradient bank, and a question that needs gradients. Build one, or open it.")
        absent = [name for name in passages if name not in keys]
        if self.on_missing == "error" and (unknown := [name for name in absent if name in named]):
            raise MissingGradientError(unknown)
        fresh: dict[str, Tensor] = {}
        known: dict[str, str] | None = keys
        if absent and self.on_missing == "encode":
            fresh = self._encode([passages[name] for name in absent])
            absent, known = [], None
        used = [tuple(name for name in hits if name not in absent) for hits in needed]
        totals = self._add_up(used, fresh, known)
        return [
            GradientSum(total if names else None, names, tuple(name for name in hits if name in absent))
            for hits, names, total in zip(needed, used, totals, strict=True)
        ]

    def _add_up(
        self, used: Sequence[Sequence[str]], fresh: Mapping[str, Tensor], keys: dict[str, str] | None
    ) -> list[Tensor]:
        """The sum of each set of gradients [numbers]; sets are read together up to `READ_BYTES`."""
        bank = self.bank
        if bank is None:
            return []
        if fresh:
            # sorted by id, as in the bank, so that the sum does not depend on the order of passages
            blank = torch.zeros(bank.layout.size)
            return [
                sum((fresh[name] if name in fresh else bank.get([name])[0] for name in sorted(names)), blank)
                for names in used
            ]
        most = max(1, max(len(names) for names in used)) * bank.manifest.stride
        together = max(1, READ_BYTES // most)
        totals: list[Tensor] = []
        for start in range(0, len(used), together):
            totals += bank.sums([dict.fromkeys(names, 1.0) for names in used[start : start + together]], keys)
        return totals

    def _encode(self, hits: Sequence[Hit]) -> dict[str, Tensor]:
        """Gradients of passages that the bank lacks; empty if they were written to the bank."""
        unknown = [hit.id for hit in hits if not hit.text]
        if unknown or self.bank is None:
            raise MissingGradientError(unknown)
        gradients = self.encoder.encode([Passage(hit.id, hit.text, hit.title) for hit in hits])
        if self.bank.mode == "a":
            self.bank.append(gradients)
            return {}
        return {one.id: torch.as_tensor(one.values) for one in gradients}


def stores_adapters(bank: GradientBank | None) -> bool:
    """True if a bank stores trained adapters, which are added without step sizes."""
    return bank is not None and bank.manifest.record == TRAINED_ADAPTER


def default_strength(config: ReGradConfig, bank: GradientBank | None) -> float:
    """Return the default strength of a question; 0 after plain continual pretraining, which answers without a step."""
    return config.strength if config.outer_loss or stores_adapters(bank) else 0.0


def _ids(passages: Sequence[str | Passage]) -> list[str]:
    return [one if isinstance(one, str) else one.id for one in passages]


def _without_missing(question: Question, hits: tuple[Hit, ...], summed: GradientSum) -> tuple[Hit, ...]:
    """Hits without those retrieved ones that have no gradient: passages that a question names stay in the prompt."""
    if question.passages is not None or not summed.missing:
        return hits
    kept = [hit for hit in hits if hit.id not in summed.missing]
    return tuple(replace(hit, rank=rank) for rank, hit in enumerate(kept))


def _retrieved_update(
    question: Question, hits: tuple[Hit, ...], summed: GradientSum, steps: Tensor | None, seconds: Mapping[str, float]
) -> RetrievedUpdate:
    """The update of one question; without step sizes the sum is that of trained adapters."""
    delta, norm = None, 0.0
    if summed.total is not None:
        delta = (
            functional.update(steps, summed.total[None], question.strength)[0]  # [1 numbers] -> [numbers]
            if steps is not None
            else question.strength * summed.total
        )
        norm = float(functional.norms(delta))
    return RetrievedUpdate(question, hits, summed.used, summed.missing, delta, norm, seconds)
