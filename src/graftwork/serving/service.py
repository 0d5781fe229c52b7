"""Operations behind the endpoints and the page: limits, timeouts, cancellation, and conversion to JSON."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork.errors import ConfigError, GraftworkError
from graftwork.evaluation.sampling import Sampling, derive_seed
from graftwork.methods.regrad.answering.gradient_retrieval import default_strength
from graftwork.methods.regrad.bank.changes import is_changeable
from graftwork.methods.regrad.text.requests import PASSAGES, Question
from graftwork.serving.answer_stream import AnswerStream, DisconnectWaiter, UnknownPassageError
from graftwork.serving.bank_changes import ChangeWorker
from graftwork.serving.queued_request import Completion, Delta, QueuedRequest
from graftwork.serving.request_queue import RequestQueue
from graftwork.serving.schemas import MAX_SEED
from graftwork.serving.telemetry import Telemetry

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.bank.erasure import Erased
    from graftwork.retrieval.retriever import Passage
    from graftwork.serving.settings import ServeSettings
    from graftwork.tasks.multihop import Kind

Result = TypeVar("Result")


class LimitError(GraftworkError, ValueError):
    """A request exceeds a limit of the server."""


class RepeatedPassageError(GraftworkError, ValueError):
    """A request adds two passages with one id."""


class Service:
    """Asynchronous operations on a model, a bank and an index, for many concurrent requests.

    Args:
        answerer: The model with its bank and its index.
        settings: Batching and limits.
        name: Model name in OpenAI's API.
        shared: Service of the same model whose queue and metrics this one uses; None creates some.
    """

    def __init__(
        self, answerer: Answerer, settings: ServeSettings, *, name: str, shared: Service | None = None
    ) -> None:
        self.answerer, self.settings, self.name = answerer, settings, name
        self.shared = shared
        self.telemetry = Telemetry() if shared is None else shared.telemetry
        self.queue = RequestQueue(answerer, settings, self.telemetry) if shared is None else shared.queue
        self.changes = ChangeWorker(answerer, self.queue, settings)
        if shared is None:
            self.telemetry.add_gauges(lambda: len(self.queue), lambda: self.queue.healthy)
        bank = answerer.gradient_retriever.bank
        # a bank's fingerprint also contains the kind of its records
        fingerprint = answerer.encoder.fingerprint if bank is None else dict(bank.manifest.fingerprint)
        self.fingerprint = blake2b(json.dumps(fingerprint, sort_keys=True).encode(), digest_size=16).hexdigest()

    def start(self) -> None:
        """Start the threads of the service."""
        if self.shared is None:
            self.queue.start()
        self.changes.start()

    def close(self) -> None:
        """Finish the answers and the change in progress, and reject the others."""
        self.changes.close()
        if self.shared is None:
            self.queue.close()

    def question(
        self,
        text: str,
        *,
        passage_ids: Sequence[str] | None = None,
        top_k: int | None = None,
        strength: float | None = None,
        blind: bool | None = None,
        adapter: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        kind: Kind = "open",
        choices: Sequence[str] = (),
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        verbatim: bool = False,
    ) -> Question:
        """Return a question within the limits; None takes the model's settings.

        Args:
            text: The question.
            passage_ids: Ids of the passages to use; None retrieves passages.
            top_k: Maximum number of passages to retrieve.
            strength: Factor of the gradient step.
            blind: False puts the passages into the prompt as well.
            adapter: False answers with the pretrained model.
            temperature: Sampling temperature; 0 for greedy decoding.
            top_p: Total probability of the tokens to sample from.
            seed: Sampling seed; None draws a random one.
            kind: Kind of question: open, yes_no or choice.
            choices: The five options of a question of kind choice.
            system: System prompt in place of the model's; None for that one.
            history: Earlier turns of the conversation, as (role, text).
            verbatim: Use the text as the whole prompt and return its continuation.

        Raises:
            LimitError: If a length or a number exceeds its limit.
            ConfigError: If the combination is invalid.
        """
        config = self.answerer.config
        count = (config.passages or PASSAGES) if top_k is None else top_k
        default = default_strength(config, self.answerer.gradient_retriever.bank)
        for one in (text, *choices, system or "", *(turn for _, turn in history)):
            self._check_limit(len(one), self.settings.max_question_characters, "characters", "question")
        for number in (count, len(passage_ids or ())):
            self._check_limit(number, self.settings.max_passages, "passages", "question")
        return Question(
            text,
            None if passage_ids is None else tuple(passage_ids),
            count,
            default if strength is None else strength,
            config.adapter if adapter is None else adapter,
            not (config.blind if blind is None else blind),
            kind,
            tuple(choices),
            self._sampling(temperature, top_p, seed),
            system,
            tuple(history),
            verbatim,
        )

    def repeated(self, question: Question, count: int) -> list[Question]:
        """Return a question as often as answers are requested; further ones have seeds derived from the first.

        Raises:
            LimitError: If there are too many.
        """
        self.check_choices(count)
        sampling = question.sampling
        if sampling is None:
            return [question] * count
        seeds = [derive_seed(sampling.seed, str(number)) % (MAX_SEED + 1) for number in range(1, count)]
        return [question, *(replace(question, sampling=replace(sampling, seed=seed)) for seed in seeds)]

    def check_choices(self, count: int) -> None:
        """Raise an error if one request asks for too many answers.

        Raises:
            LimitError: If it does.
        """
        self._check_limit(count, self.settings.max_choices, "answers", "request")

    def _sampling(self, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling | None:
        config = self.answerer.config
        chosen = config.temperature if temperature is None else temperature
        share = config.top_p if top_p is None else top_p
        return Sampling(chosen, share, secrets.randbelow(MAX_SEED + 1) if seed is None else seed) if chosen else None

    async def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        top: int | None = None,
        disconnected: DisconnectWaiter | None = None,
    ) -> list[Completion]:
        """Answer a few questions together.

        Args:
            questions: Results of `question`.
            max_new_tokens: Maximum number of new tokens; None takes the server's default.
            stop: Sequences that end an answer; they are no part of it.
            top: Number of most likely tokens to report with each token; None reports no probabilities.
            disconnected: Returns once the client has disconnected; generation is then cancelled.

        Raises:
            BusyError: If the queue is full.
            DeadlineError: If the answers take longer than the timeout.
            ClientDisconnectedError: If the client disconnects.
            UnknownPassageError: If a named passage has no gradient.
        """
        stream = self._stream(questions, max_new_tokens, stop, top, disconnected, parts=False)
        async with aclosing(stream.events(time.monotonic() + self.settings.timeout)) as events:
            found = {number: event async for number, event in events if isinstance(event, Completion)}
        return [found[number] for number in range(len(questions))]

    def stream(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        top: int | None = None,
        disconnected: DisconnectWaiter | None = None,
    ) -> AsyncGenerator[tuple[int, Delta | Completion]]:
        """Submit questions and return their answers in parts: number of the question, and a part or its completion.

        The timeout is that of the next part. See `answer` for arguments and errors; errors of the submission are raised
        at once. Close the generator to cancel the answers.
        """
        return self._stream(questions, max_new_tokens, stop, top, disconnected, parts=True).events()

    def _stream(
        self,
        questions: Sequence[Question],
        max_new_tokens: int | None,
        stop: Sequence[str],
        top: int | None,
        disconnected: DisconnectWaiter | None,
        *,
        parts: bool,
    ) -> AnswerStream:
        tokens = self.settings.default_new_tokens if max_new_tokens is None else max_new_tokens
        self._check_limit(tokens, self.settings.max_new_tokens, "tokens to generate", "answer")
        requests = [QueuedRequest(self.answerer, one, tokens, tuple(stop), top) for one in questions]
        found = AnswerStream(requests, self.settings.timeout, self.telemetry, disconnected, parts=parts)
        self.queue.submit(requests)
        return found

    async def add(self, passages: Sequence[Passage], *, replace: bool = False) -> dict[str, Any]:
        """Encode passages and store them; they are on disk when this returns.

        Raises:
            DuplicatePassageError: If an id exists with another text and `replace` is False.
            LimitError: If there are too many passages, or one is too long.
        """
        self._check_limit(len(passages), self.settings.max_passages, "passages", "request")
        for one in passages:
            for text in (one.text, one.title):
                self._check_limit(len(text), self.settings.max_passage_characters, "characters", f"passage {one.id!r}")
        if len({one.id for one in passages}) < len(passages):
            raise RepeatedPassageError("Found an id twice among the passages; expected every id once.")
        # gradients of changed weights would be wrong
        self.queue.check()
        done = await self._run_change(lambda answerer: answerer.add_passages(passages, replace=replace))
        self.telemetry.passages.labels("added").inc(done.written + done.aliased)
        return {
            "written": done.written,
            "aliased": done.aliased,
            "skipped": done.skipped,
            "replaced": done.replaced,
            "indexed": is_changeable(self.answerer.gradient_retriever.retriever),
        }

    async def delete(self, id: str, *, erase: bool = False) -> dict[str, Any] | None:
        """Delete a passage from the bank and the index; questions submitted after this returns do not use it.

        Args:
            id: Id of the passage.
            erase: Remove its bytes from the files, and return the record of the erasure. The passage may have been
                deleted before.

        Raises:
            UnknownPassageError: If neither the bank nor the index contains it.
        """

        def delete(answerer: Answerer) -> tuple[bool, Erased | None]:
            # another server may have deleted it
            answerer.gradient_retriever.refresh()
            index: Any = answerer.gradient_retriever.retriever
            indexed = is_changeable(index) and bool(index.passages([id]))
            if not erase:
                return not answerer.delete_passages([id]) or indexed, None
            missing, record = answerer.erase_passages([id])
            return not missing or indexed, record

        found, record = await self._run_change(delete)
        if not found and record is None:
            raise UnknownPassageError(f"Found no passage {id!r}. Give the id that it was added under.")
        if found:
            self.telemetry.passages.labels("deleted").inc()
        return None if record is None else asdict(record)

    async def stats(self) -> dict[str, Any]:
        """Return the size of the bank and the fingerprints of model and bank."""
        bank = self.answerer.gradient_retriever.bank
        if bank is None:
            raise ConfigError("Found no bank; the server was started without one.")

        def stats() -> dict[str, Any]:
            self.answerer.gradient_retriever.refresh()
            return {**bank.stats(), "fingerprint": {"model": self.fingerprint, "bank": bank.commit_record.ids_digest}}

        # on the model thread, which does not wait for a long change
        return await asyncio.wrap_future(self.queue.run_between_batches(stats))

    def record(self, completion: Completion) -> dict[str, Any]:
        """Return an answer's JSON fields, without its text."""
        answer = completion.answer
        seconds = {"wait": completion.waited, "first_token": completion.first_token, **answer.seconds}
        return {
            "passages": [
                {
                    "id": hit.id,
                    "document": hit.document,
                    "title": hit.title,
                    "score": _rounded(hit.score),
                    "rank": hit.rank,
                }
                for hit in answer.passages
            ],
            "missing": list(answer.missing),
            "update_norm": _rounded(answer.update_norm),
            "tokens": answer.tokens,
            "seconds": {name: round(spent, 6) for name, spent in seconds.items()},
            "fingerprint": {"model": self.fingerprint, "bank": completion.bank},
            **({} if answer.seed is None else {"seed": answer.seed}),
        }

    async def _run_change(self, change: Callable[[Answerer], Result]) -> Result:
        """Run a change to completion even if the client disconnects: changes are never applied in part."""
        future = self.changes.submit(change)
        return await asyncio.shield(asyncio.wrap_future(future))

    def _check_limit(self, found: int, most: int, unit: str, what: str) -> None:
        if not 0 <= found <= most:
            raise LimitError(f"Found {found} {unit} in the {what}; expected at most {most}.")


def _rounded(number: float) -> float | None:
    """Six decimals; None for NaN and infinity, which JSON does not have."""
    return round(number, 6) if math.isfinite(number) else None
