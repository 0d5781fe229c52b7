"""What the endpoints and the page do: limits, waiting, giving up, and the words for what comes back."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Coroutine, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork.errors import ConfigError, GraftworkError
from graftwork.methods.regrad.answering.gradient_retrieval import usual_strength
from graftwork.methods.regrad.bank.errors import MissingGradientError
from graftwork.methods.regrad.text.requests import PASSAGES, Question
from graftwork.methods.regrad.text.sampling import SEEDS, Sampling
from graftwork.serving.request_queue import Line, Pending, Served
from graftwork.serving.telemetry import Measures

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.retrieval.retriever import Passage
    from graftwork.serving.settings import ServeSettings

Result = TypeVar("Result")
Gone = Callable[[], Coroutine[Any, Any, None]]
"""Returns once nobody waits for the answer any more."""


class LimitError(GraftworkError, ValueError):
    """A request asks for more than the server gives."""


class UnknownPassageError(GraftworkError, LookupError):
    """A passage was named that there is not."""


class DeadlineError(GraftworkError, TimeoutError):
    """An answer took longer than requests may."""


class GoneError(GraftworkError, ConnectionError):
    """Who asked has hung up."""


class Service:
    """Answers, adds and deletes for many requests at once.

    Args:
        answerer: The model with its bank and its index.
        settings: Sizes and limits.
        name: What the model is called.
    """

    def __init__(self, answerer: Answerer, settings: ServeSettings, *, name: str) -> None:
        self.answerer, self.settings, self.name = answerer, settings, name
        self.measures = Measures()
        self.line = Line(answerer, settings, self.measures)
        self.measures.watch(lambda: len(self.line), lambda: self.line.healthy)
        bank = answerer.recall.bank
        # a bank also says what its records are
        belongs = answerer.encoder.fingerprint if bank is None else dict(bank.manifest.fingerprint)
        named = json.dumps(belongs, sort_keys=True)
        self.fingerprint = blake2b(named.encode(), digest_size=16).hexdigest()

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
        kind: Any = "open",
        choices: Sequence[str] = (),
    ) -> Question:
        """A question within the limits; what is left out is as the model's settings say.

        Raises:
            LimitError: If it asks for too much.
            ConfigError: If it cannot be asked.
        """
        config = self.answerer.config
        count = (config.passages or PASSAGES) if top_k is None else top_k
        usual = usual_strength(config, self.answerer.recall.bank)
        self._limit(len(text) + sum(map(len, choices)), self.settings.max_question_characters, "characters", "question")
        self._limit(
            count if passage_ids is None else len(passage_ids), self.settings.max_passages, "passages", "question"
        )
        return Question(
            text,
            None if passage_ids is None else tuple(passage_ids),
            count,
            usual if strength is None else strength,
            config.adapter if adapter is None else adapter,
            not (config.blind if blind is None else blind),
            kind,
            tuple(choices),
            self._sampling(temperature, top_p, seed),
        )

    def _sampling(self, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling | None:
        config = self.answerer.config
        usual = config.temperature if temperature is None else temperature
        share = config.top_p if top_p is None else top_p
        return Sampling(usual, share, secrets.randbelow(SEEDS) if seed is None else seed) if usual else None

    async def answer(
        self, questions: Sequence[Question], *, max_new_tokens: int | None = None, gone: Gone | None = None
    ) -> list[Served]:
        """Answer a few questions together.

        Args:
            questions: What `question` made.
            max_new_tokens: Tokens generated at most.
            gone: Whoever asked; once gone, the answers are broken off.

        Raises:
            BusyError: If the line is full.
            DeadlineError: If it takes too long.
            GoneError: If nobody waits any more.
            UnknownPassageError: If a named passage has no gradient.
        """
        tokens = self.settings.default_new_tokens if max_new_tokens is None else max_new_tokens
        self._limit(tokens, self.settings.max_new_tokens, "tokens to generate", "answer")
        pending = self.line.ask(questions, tokens)
        try:
            return await self._settled(pending, gone)
        except MissingGradientError as error:
            if any(question.passages is not None for question in questions):
                raise UnknownPassageError(str(error)) from None
            raise
        finally:
            # cancellation of the request itself ends here as well; for what has its answer this changes nothing
            for one in pending:
                one.give_up()

    async def add(self, passages: Sequence[Passage], *, replace: bool = False) -> dict[str, Any]:
        """Encode passages and keep them, safe on disk when this returns.

        Raises:
            DuplicatePassageError: If an id stands for another text and was not to be replaced.
            LimitError: If there are too many, or one is too long.
        """
        self._limit(len(passages), self.settings.max_passages, "passages", "request")
        for one in passages:
            size = len(one.text) + len(one.title)
            self._limit(size, self.settings.max_passage_characters, "characters", f"passage {one.id!r}")
        if len({one.id for one in passages}) < len(passages):
            raise ConfigError("Found an id twice among the passages; expected every id once.")
        done = await self._changed(lambda: self.answerer.add_passages(passages, replace=replace))
        self.measures.passages.labels("added").inc(done.written + done.aliased)
        return {
            "written": done.written,
            "aliased": done.aliased,
            "skipped": done.skipped,
            "replaced": done.replaced,
            "indexed": hasattr(self.answerer.recall.retriever, "add"),
        }

    async def delete(self, id: str) -> None:
        """Forget a passage; no question that is asked after this returned sees it.

        Raises:
            UnknownPassageError: If neither the bank nor the index has it.
        """

        def forget() -> bool:
            look_up = getattr(self.answerer.recall.retriever, "passages", None)
            indexed = look_up is not None and bool(look_up([id]))
            return not self.answerer.delete_passages([id]) or indexed

        if not await self._changed(forget):
            raise UnknownPassageError(f"Found no passage {id!r}. Give the id that it was added under.")
        self.measures.passages.labels("deleted").inc()

    async def stats(self) -> dict[str, Any]:
        """How much is in the bank, and what it belongs to."""
        bank = self.answerer.recall.bank
        if bank is None:
            raise ConfigError("Found no bank; the server was started without one.")
        found = await self._changed(bank.stats)
        return {**found, "fingerprint": {"model": self.fingerprint, "bank": bank.commit_record.ids_digest}}

    def record(self, served: Served) -> dict[str, Any]:
        """An answer as JSON holds it, without its text."""
        answer = served.answer
        seconds = {"wait": served.waited, **answer.seconds}
        return {
            "passages": [
                {"id": hit.id, "title": hit.title, "score": round(hit.score, 6), "rank": hit.rank}
                for hit in answer.passages
            ],
            "missing": list(answer.missing),
            "update_norm": round(answer.update_norm, 6),
            "tokens": answer.tokens,
            "seconds": {name: round(spent, 6) for name, spent in seconds.items()},
            "fingerprint": {"model": self.fingerprint, "bank": served.bank},
            **({} if answer.seed is None else {"seed": answer.seed}),
        }

    async def _settled(self, pending: Sequence[Pending], gone: Gone | None) -> list[Served]:
        answers = asyncio.gather(*(asyncio.wrap_future(one.future) for one in pending))
        watched: set[asyncio.Future[Any]] = {answers}
        if gone is not None:
            watched.add(asyncio.ensure_future(gone()))
        try:
            await asyncio.wait(watched, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            if any(one.done() for one in watched):
                self.measures.given_up.labels("gone").inc(len(pending))
                raise GoneError("Who asked has hung up.")
            self.measures.given_up.labels("timeout").inc(len(pending))
            raise DeadlineError(
                f"Found no answer within {self.settings.timeout:g} seconds. Ask again later, or for fewer tokens."
            )
        finally:
            for one in watched:
                one.cancel()

    async def _changed(self, action: Callable[[], Result]) -> Result:
        """Carry a change out to its end, even if who asked for it hangs up: half of one must not be possible."""
        future = self.line.change(action)
        return await asyncio.shield(asyncio.wrap_future(future))

    def _limit(self, found: int, most: int, unit: str, what: str) -> None:
        if not 0 <= found <= most:
            raise LimitError(f"Found {found} {unit} in the {what}; expected at most {most}.")
