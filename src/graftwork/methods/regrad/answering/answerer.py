"""Answering after one temporary gradient step: each row of a batch has its own update."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad.answering.cancellation import CancellationCriterion, IsCancelled
from graftwork.methods.regrad.answering.decoding import ContinuousDecoder, DecodingRow, batches_prompts, decode
from graftwork.methods.regrad.answering.digests import WeightsChecker, weights_digest
from graftwork.methods.regrad.answering.gradient_retrieval import GradientRetriever, Missing
from graftwork.methods.regrad.answering.in_place import InPlaceUpdater, WeightsChangedError
from graftwork.methods.regrad.answering.row_updates import RowUpdates
from graftwork.methods.regrad.answering.static_batches import generate_batch
from graftwork.methods.regrad.bank.changes import added, complete, delete, is_changeable, remove_deleted
from graftwork.methods.regrad.bank.erasure import Erased, erase
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import Appended
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.text.generation import model_stop_tokens, pad_left
from graftwork.methods.regrad.text.prompting import PromptBuilder
from graftwork.methods.regrad.text.requests import Answer, Question, RetrievedUpdate
from graftwork.retrieval.retriever import Passage, Retriever
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.methods.regrad.config import ReGradConfig


@dataclass(frozen=True, slots=True)
class Influence:
    """Effect of one passage on an answer."""

    id: str
    change: float
    """Log-probability of the answer with all passages, minus that without this one, in nats."""
    log_probability: float
    """Log-probability of the answer without the passage."""


class Answerer:
    """Answers questions in batches, from a bank of gradients. Thread-safe.

    Row i of a batch is answered by the model with adapter θ + Δ_i, where Δ_i = −γ_i · α ⊙ Σ_{d ∈ D_i} g_d is the update
    of its question. Updates are arguments of the batch: adapted layers add them in prefill and in every decoding step,
    and weights are never written to. With `in_place`, one update at a time is written into the adapter and restored,
    for engines that read parameters only.

    Source: ReGrad's inference, one step on the sum of the passages' gradients.
    Differs from it: questions are batched, each with its own passages and strength; no weights to restore.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        bank: The gradients; None if no question needs gradients. Open it with mode "a" to add and delete passages.
        retriever: Passage retriever; None if all questions name their passages.
        config: Settings of the conversion.
        on_missing: Handling of passages without a gradient: error, skip, or encode.
        batch_size: Number of questions in a batch.
        context_tokens: Maximum number of tokens of all passages in a prompt; the last passages are cut first.
        in_place: True writes updates into the adapter and restores it; batches then have one row.
        check_every: Number of in-place answers between two checks of all weights.
        encoder: Encoder of added and missing passages; None takes the gradient encoder. Only a bank of trained adapters
            needs another one.

    Raises:
        FingerprintMismatchError: If the bank was encoded with another model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
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
            complete(bank, retriever)
        self.gradient_retriever = GradientRetriever(self.encoder, bank, retriever, on_missing)
        self.prompts = PromptBuilder(tokenizer, config, context_tokens, _context_length(model))
        self.in_place = InPlaceUpdater(model, check_every=check_every) if in_place else None
        self._pad = padding_id(tokenizer)
        self._write_lock = threading.Lock()
        self._checker: WeightsChecker | None = None
        self._healthy = True

    def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int = 20, cancelled: IsCancelled | None = None
    ) -> list[Answer]:
        """Retrieve updates and generate answers, up to a line feed or the end of the turn.

        Args:
            questions: Questions with any mixture of options.
            max_new_tokens: Maximum number of new tokens.
            cancelled: Called before every token; generation of a question stops once it returns True.

        Raises:
            MissingGradientError: If a passage has no gradient and `on_missing` is "error".
            DataError: If a question exceeds the model's context.
            WeightsChangedError: If the weights were found to have changed.
        """
        return self.generate(
            self.gradient_retriever.retrieve(questions), max_new_tokens=max_new_tokens, cancelled=cancelled
        )

    def generate(
        self, updates: Sequence[RetrievedUpdate], *, max_new_tokens: int = 20, cancelled: IsCancelled | None = None
    ) -> list[Answer]:
        """Generate answers for retrieved updates; the longest prompts are batched first. See `answer`.

        Separate from retrieval, so that a retrieval error fails its own question instead of the batch.
        """
        self._check_health()
        prompts = [self.prompts.build(one.question, one.hits, max_new_tokens) for one in updates]
        order = sorted(range(len(updates)), key=lambda number: -len(prompts[number]))
        answers: dict[int, Answer] = {}
        size = 1 if self.in_place is not None else self.batch_size
        # rows with different stop tokens never share a batch
        kinds = [[number for number in order if updates[number].question.verbatim is kind] for kind in (False, True)]
        batches = [kind[start : start + size] for kind in kinds for start in range(0, len(kind), size)]
        decodes = self.in_place is None and batches_prompts(self.model, self._pad)
        for chosen in batches:
            if decodes:
                answers.update(
                    zip(chosen, self._decode(updates, prompts, chosen, max_new_tokens, cancelled), strict=True)
                )
                continue
            stopped = None if cancelled is None else CancellationCriterion(cancelled, chosen)
            began = time.perf_counter()
            rows = generate_batch(
                RowUpdates(self.model, [updates[number] for number in chosen], self.in_place),
                [prompts[number] for number in chosen],
                self.stop_tokens(updates[chosen[0]].question),
                padding=self._pad,
                max_new_tokens=max_new_tokens,
                stopped=stopped,
            )
            spent = time.perf_counter() - began
            for row, number in enumerate(chosen):
                was_cancelled = stopped is not None and row in stopped.rows
                answers[number] = self._answer(updates[number], rows[row], spent, was_cancelled)
        return [answers[number] for number in range(len(updates))]

    def decoder(self) -> ContinuousDecoder:
        """Return a decoder for answers that begin and end at different times."""
        return ContinuousDecoder(self.model, self._pad, self.in_place)

    def decoding_row(self, update: RetrievedUpdate, max_new_tokens: int, *, top: int | None = None) -> DecodingRow:
        """Return the row of a question for a decoder.

        Args:
            update: The question with its update.
            max_new_tokens: Maximum number of new tokens.
            top: Number of most likely tokens to record with each token; None records no probabilities.

        Raises:
            ContextLengthError: If the question exceeds the model's context.
            WeightsChangedError: If the weights were found to have changed.
        """
        self._check_health()
        prompt = self.prompts.build(update.question, update.hits, max_new_tokens)
        return DecodingRow(update, prompt, max_new_tokens, self.stop_tokens(update.question), top)

    def decoded(self, row: DecodingRow, *, cancelled: bool = False) -> Answer:
        """Return the answer of a row; its time is that since the row was created."""
        answer = self._answer(row.update, row.tokens, time.perf_counter() - row.began, cancelled)
        return replace(answer, probabilities=tuple(row.probabilities))

    def text_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Return generated tokens without special tokens."""
        return [token for token in tokens if token not in self.prompts.special_tokens]

    def stop_tokens(self, question: Question) -> frozenset[int]:
        """Return the tokens that end the answer to a question."""
        return self._ends if question.verbatim else self.prompts.stop_tokens | self._ends

    def with_own_handles(self) -> Answerer:
        """Return an answerer of the same model that opens bank and index again, for changes on another thread."""
        bank = self.gradient_retriever.bank
        retriever: Any = self.gradient_retriever.retriever
        # clients of search servers are thread-safe
        index = retriever.reopened() if is_changeable(retriever) else retriever
        return Answerer(
            self.model,
            self.prompts.tokenizer,
            None if bank is None else GradientBank(bank.backend, "a" if bank.mode == "a" else "r"),
            index,
            config=self.config,
            on_missing=self.gradient_retriever.on_missing,
            batch_size=self.batch_size,
            encoder=self.encoder,
        )

    def log_probabilities(self, updates: Sequence[RetrievedUpdate], answer: Sequence[int]) -> list[float]:
        """Return the log-probability of one answer under each update: Σ_t log p(y_t | prompt, y_<t).

        Args:
            updates: Retrieved updates, with their questions.
            answer: Token ids of the answer.
        """
        prompts = [self.prompts.build(one.question, one.hits, len(answer)) for one in updates]
        found: list[float] = []
        size = 1 if self.in_place is not None else self.batch_size
        for start in range(0, len(updates), size):
            rows = updates[start : start + size]
            sequences = [[*prompt, *answer] for prompt in prompts[start : start + size]]
            ids, mask = pad_left(sequences, self._pad, self._device)  # [rows tokens]
            with torch.no_grad(), RowUpdates(self.model, rows, self.in_place).applied():
                logits: Tensor = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=_position_ids(mask), use_cache=False
                ).logits
            # left padding aligns the answers at the end of all rows; logits at t predict token t + 1
            predicted = logits[:, -len(answer) - 1 : -1].float().log_softmax(-1)  # [rows answer vocabulary]
            chosen = predicted.gather(-1, ids[:, -len(answer) :, None])  # [rows answer 1]
            found += [float(total) for total in chosen.sum((1, 2))]
        return found

    def explain(self, question: Question, *, max_new_tokens: int = 20) -> tuple[Answer, list[Influence]]:
        """Answer, and compute the influence of each passage on the answer by leave-one-out.

        For passage d the influence is log p(y | D) − log p(y | D ∖ {d}): the passage is left out of the update, and of
        the prompt if `context` is set.
        """
        update = self.gradient_retriever.retrieve([question])[0]
        answer = self.generate([update], max_new_tokens=max_new_tokens)[0]
        if not answer.generated or not update.hits:
            return answer, []
        others = [self.gradient_retriever.without(update, hit.id) for hit in update.hits]
        complete, *left_out = self.log_probabilities([update, *others], answer.generated)
        return answer, [
            Influence(hit.id, complete - reduced, reduced) for hit, reduced in zip(update.hits, left_out, strict=True)
        ]

    def add_passages(self, passages: Sequence[Passage], *, replace: bool = False) -> Appended:
        """Encode passages and store them in the bank and, if the index can be extended, in the index.

        Raises:
            DuplicatePassageError: If an id exists with another text and `replace` is False.
            DataError: If a passage has too few tokens for a gradient.
            ConfigError: If the bank is open for reading only.
            FingerprintMismatchError: If the encoder produces another kind of record than the bank contains.
        """
        bank = self._writable_bank()
        self.encoder.check_adds(bank)
        with self._write_lock:
            documents = {one.id: one for one in map(self.encoder.document, passages)}
            existing = bank.keys(list(documents))
            new = [one for one in passages if existing.get(one.id) != documents[one.id].key]
            gradients, index = self.encoder.encode(new), self.gradient_retriever.retriever
            if is_changeable(index):
                with self.gradient_retriever.lock, added(bank, index, self.encoder.keyed(passages)):
                    done = bank.append(gradients, replace=replace)
            else:
                done = bank.append(gradients, replace=replace)
        return Appended(done.written, done.aliased, done.skipped + len(passages) - len(new), done.replaced)

    def delete_passages(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Delete passages from the index and the bank; questions asked after this returns do not use them.

        Returns:
            The ids that the bank did not contain.
        """
        bank = self._writable_bank()
        with self._write_lock, self.gradient_retriever.lock:
            index = self.gradient_retriever.retriever
            return delete(bank, index, ids) if is_changeable(index) else bank.delete(ids)

    def erase_passages(self, ids: Sequence[str]) -> tuple[tuple[str, ...], Erased]:
        """Delete passages and remove their bytes from the files of bank and index. See `erasure.erase`.

        Returns:
            The ids that the bank did not contain, and the record of the erasure.
        """
        bank = self._writable_bank()
        with self._write_lock, self.gradient_retriever.lock:
            return erase(bank, self.gradient_retriever.retriever, ids)

    def remove_deleted(self) -> bool:
        """Remove what earlier deletions have left from the files of bank and index. Return True if there was any."""
        bank, index = self.gradient_retriever.bank, self.gradient_retriever.retriever
        if bank is None or bank.mode != "a":
            return False
        with self._write_lock, self.gradient_retriever.lock:
            return remove_deleted(bank, index)

    def weights_digest(self) -> str:
        """Return a digest of all weights and buffers; any changed bit changes it."""
        return weights_digest(self.model)

    def check_weights(self, share: float = 1.0) -> bool:
        """Return True if all weights equal those at the first call; once they differ, questions raise an error.

        Args:
            share: Share of the weights to compare, in turns: calls whose shares add up to 1 compare all of them.
        """
        if self._checker is None:
            self._checker = WeightsChecker(self.model)
        elif self._healthy:
            self._healthy = self._checker.check(share)
        return self.healthy

    @property
    def healthy(self) -> bool:
        """True if no check has found changed weights."""
        return self._healthy and (self.in_place is None or self.in_place.healthy)

    def _check_health(self) -> None:
        if not self.healthy:
            raise WeightsChangedError(
                "Found weights that differ from those at the start; the model no longer answers. Load the model again."
            )

    def _writable_bank(self) -> GradientBank:
        bank = self.gradient_retriever.bank
        if bank is None or bank.mode != "a":
            raise ConfigError(
                f"Found {'no bank' if bank is None else 'a bank that is open for reading'}; expected one that is open "
                "for writing. Open it with mode 'a'."
            )
        return bank

    def _decode(
        self,
        updates: Sequence[RetrievedUpdate],
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[int],
        max_new_tokens: int,
        cancelled: IsCancelled | None,
    ) -> list[Answer]:
        """Answers of one batch, each of which ends with its own last token."""
        rows = [
            DecodingRow(updates[one], prompts[one], max_new_tokens, self.stop_tokens(updates[one].question))
            for one in chosen
        ]
        gone = decode(self.decoder(), rows, None if cancelled is None else lambda row: cancelled(chosen[row]))
        return [self.decoded(row, cancelled=number in gone) for number, row in enumerate(rows)]

    def _answer(self, updates: RetrievedUpdate, tokens: Sequence[int], spent: float, cancelled: bool) -> Answer:
        text_tokens = self.text_tokens(tokens)
        sampling = updates.question.sampling
        return Answer(
            self.prompts.decode(text_tokens, verbatim=updates.question.verbatim),
            updates.hits,
            updates.update_norm,
            updates.missing,
            {**updates.seconds, "generate": spent},
            len(tokens),
            cancelled,
            tuple(text_tokens),
            None if sampling is None else sampling.seed,
        )

    @cached_property
    def _device(self) -> torch.device:
        return pretrained(self.model).device

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Stop tokens of the model, and the tokenizer's end of text."""
        end: Any = self.prompts.tokenizer.eos_token_id
        return frozenset(model_stop_tokens(self.model) | (set() if end is None else {int(end)}))


def _context_length(model: nn.Module) -> int | None:
    config: Any = pretrained(model).config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _position_ids(mask: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    """Positions counted from the first token after left padding."""
    return (mask.cumsum(-1) - 1).clamp_min(0)
