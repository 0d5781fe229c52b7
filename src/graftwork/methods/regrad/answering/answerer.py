"""Answering after one temporary gradient step: rows of one batch, each with an update of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad.answering.digests import weights_digest
from graftwork.methods.regrad.answering.gradient_retrieval import GradientRetriever, Missing, without
from graftwork.methods.regrad.answering.in_place import InPlaceUpdater, WeightsChangedError
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import Appended
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.modules import adapter_off, layout, updated
from graftwork.methods.regrad.text.generation import generate_tokens, model_stop_tokens, pad_left
from graftwork.methods.regrad.text.prompting import PromptBuilder
from graftwork.methods.regrad.text.requests import Answer, Question, RetrievedUpdate
from graftwork.retrieval.retriever import Passage, Retriever
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import padding_id

if TYPE_CHECKING:
    from graftwork.methods.regrad.config import ReGradConfig

IsCancelled = Callable[[int], bool]
"""Whether the question of this number, in the order of the call, need not be answered any more."""


@dataclass(frozen=True, slots=True)
class Influence:
    """What one passage did for an answer."""

    id: str
    change: float
    """How much less likely the answer is without the passage, in nats of its log-probability."""
    log_probability: float
    """The answer's log-probability without it."""


class Answerer:
    """Answers questions, in batches, from a bank of gradients. Several threads may use one.

    Weights are never written to: each row's update is handed to the adapted layers with the batch, in the first pass
    and in every decoded token. `in_place` is for engines that can only read parameters: it writes one update at a time
    and takes it back under a lock.

    Source: ReGrad's inference, one step on the sum of the passages' gradients. Differs from the authors' code: many
    questions at once, each with passages and strength of its own; nothing to restore.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        bank: The gradients; None where no question needs any. Open it with mode "a" to add and delete passages.
        retriever: Finds passages; None where questions name theirs.
        config: The settings that the model was converted with.
        on_missing: What to do about a passage without gradient: error, skip, or encode.
        batch_size: Questions generated at once.
        context_tokens: Longest that passages in a prompt may be together; they are cut, the last one first.
        in_place: Write updates into the adapter and take them back.
        check_every: In-place answers between two checks of all weights.
        encoder: Encodes passages that are added or missing; by default what makes gradients. Only a bank of trained
            adapters needs another.

    Raises:
        FingerprintMismatchError: If the bank is another model's.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: GradientBank | None = None,
        retriever: Retriever | None = None,
        *,
        config: ReGradConfig,
        on_missing: Missing = "error",
        batch_size: int = 16,
        context_tokens: int = 2048,
        in_place: bool = False,
        check_every: int = 100,
        encoder: PassageEncoder | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}. Expected a whole number from 1.")
        self.model, self.config, self.batch_size = model.eval(), config, batch_size
        self.encoder = encoder or PassageEncoder(model, tokenizer, config)
        if bank is not None:
            self.encoder.check(bank)
        self.gradient_retriever = GradientRetriever(self.encoder, bank, retriever, on_missing)
        self.prompts = PromptBuilder(tokenizer, config, context_tokens, _positions(model))
        self.in_place = InPlaceUpdater(model, check_every=check_every) if in_place else None
        self._size = layout(model).size
        self._pad = padding_id(tokenizer)
        self._changing = threading.Lock()
        self._start: str | None = None
        self._healthy = True

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int = 20, cancelled: IsCancelled | None = None
    ) -> list[Answer]:
        """Retrieve and answer, up to a line feed or the end of the turn; the likeliest token is taken, or one is drawn.

        Args:
            questions: What to answer; any mixture.
            max_new_tokens: Tokens generated at most.
            cancelled: Asked before every token; a question that says yes is broken off.

        Raises:
            MissingGradientError: If a passage has no gradient and `on_missing` is "error".
            DataError: If a question is longer than the model can read.
            WeightsChangedError: If the weights were found to have changed.
        """
        return self.generate(
            self.gradient_retriever.retrieve(questions), max_new_tokens=max_new_tokens, cancelled=cancelled
        )

    def generate(
        self, updates: Sequence[RetrievedUpdate], *, max_new_tokens: int = 20, cancelled: IsCancelled | None = None
    ) -> list[Answer]:
        """Answer what was updates before, so that what is wrong with one question is found before it joins a batch."""
        self._check_health()
        prompts = [self.prompts.build(one.question, one.hits, max_new_tokens) for one in updates]
        order = sorted(range(len(updates)), key=lambda number: -len(prompts[number]))
        answers: dict[int, Answer] = {}
        size = 1 if self.in_place is not None else self.batch_size
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            stopped = None if cancelled is None else _CancellationCriterion(cancelled, chosen)
            began = time.perf_counter()
            rows = self._generated(
                [updates[number] for number in chosen], [prompts[number] for number in chosen], max_new_tokens, stopped
            )
            spent = time.perf_counter() - began
            for row, number in enumerate(chosen):
                broken_off = stopped is not None and row in stopped.rows
                answers[number] = self._answer(updates[number], rows[row], spent, broken_off)
        return [answers[number] for number in range(len(updates))]

    def log_probabilities(self, updates: Sequence[RetrievedUpdate], answer: Sequence[int]) -> list[float]:
        """How likely each of these states of the model finds one answer, as a sum of log-probabilities of tokens."""
        prompts = [self.prompts.build(one.question, one.hits, len(answer)) for one in updates]
        found: list[float] = []
        size = 1 if self.in_place is not None else self.batch_size
        for start in range(0, len(updates), size):
            rows = updates[start : start + size]
            whole = [[*prompt, *answer] for prompt in prompts[start : start + size]]
            ids, mask = pad_left(whole, self._pad, self._device)
            with torch.no_grad(), self._applied(rows):
                # left padding puts the answer at the end of every row
                logits = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=_positions_of(mask), use_cache=False
                ).logits[:, -len(answer) - 1 : -1]
            chances = logits.float().log_softmax(-1).gather(-1, ids[:, -len(answer) :, None])
            found += chances.sum((1, 2)).tolist()
        return found

    def explain(self, question: Question, *, max_new_tokens: int = 20) -> tuple[Answer, list[Influence]]:
        """Answer, and say what each passage did for the answer: its log-probability with all of them less that without.

        A passage is left out of the update, and of the prompt if passages are shown there.
        """
        updates = self.gradient_retriever.retrieve([question])[0]
        answer = self.generate([updates], max_new_tokens=max_new_tokens)[0]
        if not answer.generated or not updates.hits:
            return answer, []
        others = [without(updates, hit.id, self.gradient_retriever) for hit in updates.hits]
        whole, *left = self.log_probabilities([updates, *others], answer.generated)
        return answer, [
            Influence(hit.id, whole - without_it, without_it)
            for hit, without_it in zip(updates.hits, left, strict=True)
        ]

    def add_passages(self, passages: Sequence[Passage], *, replace: bool = False) -> Appended:
        """Encode passages and keep them, in the bank and, if it can be added to, in the index.

        Raises:
            DuplicatePassageError: If an id stands for another text and was not to be replaced.
            DataError: If a passage has nothing to learn from.
            ConfigError: If the bank is open for reading only.
            FingerprintMismatchError: If its records are not what the encoder makes.
        """
        bank = self._writable()
        self.encoder.check_adds(bank)
        with self._changing:
            documents = {one.id: one for one in map(self.encoder.document, passages)}
            there = bank.keys(list(documents))
            new = [one for one in passages if there.get(one.id) != documents[one.id].key]
            done = bank.append(self.encoder.encode(new), replace=replace)
            add = getattr(self.gradient_retriever.retriever, "add", None)
            if add is not None:
                with self.gradient_retriever.lock:
                    add(list({one.id: one for one in passages}.values()))
        return Appended(done.written, done.aliased, done.skipped + len(passages) - len(new), done.replaced)

    def delete_passages(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Forget passages, in the index and in the bank; no question that is asked after this returned sees them.

        Returns:
            The ids that the bank did not know.
        """
        bank = self._writable()
        with self._changing, self.gradient_retriever.lock:
            take_out = getattr(self.gradient_retriever.retriever, "delete", None)
            if take_out is not None:
                take_out(ids)
            return bank.delete(ids)

    def weights_digest(self) -> str:
        """A digest of all weights and buffers; a single bit changes it."""
        return weights_digest(self.model)

    def check_weights(self) -> bool:
        """Compare all weights with those at the first call of this; once they differ, nothing is answered any more."""
        now = self.weights_digest()
        self._start = self._start or now
        self._healthy = self._healthy and now == self._start
        return self.healthy

    @property
    def healthy(self) -> bool:
        """Whether the weights are, as far as was looked, what they were."""
        return self._healthy and (self.in_place is None or self.in_place.healthy)

    def _check_health(self) -> None:
        if not self.healthy:
            raise WeightsChangedError(
                "Found weights that differ from those at the start; nothing more is answered. Load the model again."
            )

    def _writable(self) -> GradientBank:
        bank = self.gradient_retriever.bank
        if bank is None or bank.mode != "a":
            raise ConfigError(
                f"Found {'no bank' if bank is None else 'a bank that is open for reading'}; expected one that is open "
                "for writing. Open it with mode 'a'."
            )
        return bank

    def _generated(
        self,
        rows: Sequence[RetrievedUpdate],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stopped: _CancellationCriterion | None,
    ) -> list[list[int]]:
        """The tokens generated for every row of one batch, up to what ended them."""
        with self._applied(rows):
            tokens = generate_tokens(
                self.model,
                prompts,
                [row.question.sampling for row in rows],
                padding=self._pad,
                ends=self._ends,
                max_new_tokens=max_new_tokens,
                stopping=[] if stopped is None else [stopped],
            )
        ends = set(self._ends)
        found = []
        for number, row in enumerate(tokens):
            broken = stopped.rows.get(number) if stopped is not None else None
            kept = row if broken is None else row[:broken]
            length = next((at for at, token in enumerate(kept) if token in ends), None)
            # the token that ended it stays: a line feed may stand behind the last letters
            found.append(kept if length is None else kept[: length + 1])
        return found

    def _answer(self, updates: RetrievedUpdate, tokens: Sequence[int], spent: float, cancelled: bool) -> Answer:
        own = [token for token in tokens if token not in self.prompts.special_tokens]
        sampling = updates.question.sampling
        return Answer(
            self.prompts.decode(own),
            updates.hits,
            updates.update_norm,
            updates.missing,
            {**updates.seconds, "generate": spent},
            len(tokens),
            cancelled,
            tuple(own),
            None if sampling is None else sampling.seed,
        )

    @contextmanager
    def _applied(self, rows: Sequence[RetrievedUpdate]) -> Iterator[None]:
        """The model as every row needs it."""
        off = [not row.question.adapter for row in rows]
        if self.in_place is not None:
            scope: AbstractContextManager[Any] = adapter_off(self.model) if off[0] else nullcontext()
            with self.in_place.applied(rows[0].delta), scope:
                yield
            return
        if all(off):
            scope = adapter_off(self.model)
        elif not any(off) and all(row.delta is None for row in rows):
            scope = nullcontext()
        else:
            blank = torch.zeros(self._size)
            deltas = torch.stack([blank if row.delta is None else row.delta for row in rows])
            scope = updated(self.model, deltas.to(self._device), off=torch.tensor(off) if any(off) else None)
        with scope:
            yield

    @cached_property
    def _device(self) -> torch.device:
        return pretrained(self.model).device

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens that end an answer: those of the model, and every one with a line feed in it."""
        return sorted(self.prompts.stop_tokens | model_stop_tokens(self.model))


class _CancellationCriterion:
    """Asks before every token which rows need not go on; says for each how many tokens it had by then."""

    def __init__(self, cancelled: IsCancelled, numbers: Sequence[int]) -> None:
        self.cancelled, self.numbers = cancelled, numbers
        self.rows: dict[int, int] = {}
        self._tokens = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._tokens += 1
        for row, number in enumerate(self.numbers):
            if row not in self.rows and self.cancelled(number):
                self.rows[row] = self._tokens
        return torch.tensor([row in self.rows for row in range(len(self.numbers))], device=input_ids.device)


def _positions(model: nn.Module) -> int | None:
    return getattr(pretrained(model).config.get_text_config(), "max_position_embeddings", None)


def _positions_of(mask: Tensor) -> Tensor:
    """Positions of tokens, counted behind the padding."""
    return (mask.cumsum(-1) - 1).clamp_min(0)
