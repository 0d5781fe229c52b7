"""The questions of a data set put to a model: which passages each one gets, and what is told of each answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError, DataError
from graftwork.grafting.capabilities import Answering
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.gradient_retrieval import usual_strength
from graftwork.methods.regrad.bank.files import text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.text.requests import PASSAGES, Question
from graftwork.methods.regrad.text.sampling import Sampling, seed_of
from graftwork.retrieval import open_index
from graftwork.retrieval.retriever import Passage, Retriever

if TYPE_CHECKING:
    from torch import nn

    from graftwork.core.example import Example
    from graftwork.methods.regrad.config import ReGradConfig

QUERIES_AT_ONCE = 128


@contextmanager
def open_answering(
    model: nn.Module, tokenizer: Any, config: ReGradConfig, rows: Sequence[Example], settings: Any
) -> Iterator[Answering]:
    """Open the bank and the index that the settings name, for as long as there are questions.

    Raises:
        ConfigError: If questions need a bank or an index and none is named.
        FingerprintMismatchError: If the bank is another model's.
    """
    with ExitStack() as opened:
        bank = _bank(model, tokenizer, config)
        if bank is not None:
            opened.enter_context(bank)
        elif config.adapter and config.strength and config.outer_loss:
            raise ConfigError(
                "Found no gradient bank to answer from. Build one with `graftwork bank build` and name it with --set "
                "method.bank=FOLDER; or set method.strength to 0, or method.adapter to false, to answer without."
            )
        retriever = None if config.index is None else open_index(config.index, config.backend)
        answerer = Answerer(
            model,
            tokenizer,
            bank,
            retriever,
            config=config,
            on_missing=config.on_missing,
            batch_size=settings.rows_at_once,
            in_place=config.in_place,
        )
        asked = replace(config, strength=usual_strength(config, bank))
        passages = dict(zip(map(id, rows), passages_of_all(rows, asked, retriever), strict=True))

        def answer(batch: Sequence[Example]) -> list[Mapping[str, Any]]:
            questions = [question_of(row, passages[id(row)], asked) for row in batch]
            answers = answerer.answer(questions, max_new_tokens=settings.max_new_tokens)
            return [answer.record() for answer in answers]

        # a bank that grows while it is asked says the same as a whole one
        grows = config.on_missing == "encode"
        yield Answering(
            answer,
            {
                "bank": None if bank is None or not config.adapter else ("grows" if grows else bank.seal.ids_digest),
                "index": None if retriever is None else retriever.index_fingerprint(),
            },
        )


def _bank(model: nn.Module, tokenizer: Any, config: ReGradConfig) -> GradientBank | None:
    """The bank of the settings; made where it is filled as questions come."""
    if config.bank is None:
        return None
    if config.on_missing == "encode":
        return PassageEncoder(model, tokenizer, config).open_bank(config.bank)
    return GradientBank(config.bank)


def question_of(row: Example, passages: Sequence[Passage], config: ReGradConfig) -> Question:
    """An example as it is asked under these settings."""
    sampling = None
    if config.temperature:
        sampling = Sampling(config.temperature, config.top_p, seed_of(config.sampling_seed, row.key))
    return Question(
        str(row.metadata.get("question", row.input)),
        tuple(passages),
        strength=config.strength,
        adapter=config.adapter,
        context=not config.blind,
        kind=row.metadata.get("kind", "open"),
        choices=tuple(row.metadata.get("choices", ())),
        sampling=sampling,
    )


def passages_of_all(
    rows: Sequence[Example], config: ReGradConfig, retriever: Retriever | None
) -> list[tuple[Passage, ...]]:
    """The passages of every question: those of its record, else what is retrieved; exchanged, if that was asked for.

    Raises:
        ConfigError: If there is nothing to retrieve from.
    """
    needed = (config.adapter and config.strength != 0) or not config.blind
    if not needed:
        return [()] * len(rows)
    found = [recorded_passages(row, config.passages) for row in rows]
    bare = [number for number, passages in enumerate(found) if passages is None]
    if bare and retriever is None:
        raise ConfigError(
            f"Found {len(bare)} questions without passages, and no index to find some in. Augment them with "
            "`graftwork prepare --index`, or name an index with --set method.index=FOLDER."
        )
    for start in range(0, len(bare), QUERIES_AT_ONCE):
        part = bare[start : start + QUERIES_AT_ONCE]
        texts = [str(rows[number].metadata.get("question", rows[number].input)) for number in part]
        for number, hits in zip(part, retriever.search(texts, config.passages or PASSAGES), strict=True):  # type: ignore[union-attr]
            found[number] = tuple(Passage(hit.id, hit.text, hit.title) for hit in hits)
    given = [passages or () for passages in found]
    if config.shifted:
        given = [given[number - 1] for number in range(len(given))]
    return [_mixed(one, given[(number + 1) % len(given)], config.mixed) for number, one in enumerate(given)]


def recorded_passages(row: Example, count: int | None) -> tuple[Passage, ...] | None:
    """The passages that stand in an augmented record, the first ones; None if it is not one.

    Raises:
        DataError: If the record's lists do not fit together.
    """
    about = row.metadata
    if "passages" not in about:
        return None
    texts = list(about["passages"])
    # files of the original have no ids; a bank that was made of them calls passages after their texts
    ids = list(about.get("passage_ids") or (f"text-{text_key(text)}" for text in texts))
    titles = list(about.get("titles") or [""] * len(texts))
    if not len(texts) == len(ids) == len(titles):
        raise DataError(
            f"Found {len(texts)} passages, {len(ids)} ids and {len(titles)} titles in question {row.key}; expected as "
            "many of each. Augment the file again."
        )
    made = [Passage(name, text, title) for name, text, title in zip(ids, texts, titles, strict=True)]
    return tuple(made if count is None else made[:count])


def _mixed(own: Sequence[Passage], following: Sequence[Passage], share: float) -> tuple[Passage, ...]:
    """The last passages exchanged for the first ones of the next question."""
    foreign = math.floor(len(own) * share)
    return (*own[: len(own) - foreign], *following[:foreign])
