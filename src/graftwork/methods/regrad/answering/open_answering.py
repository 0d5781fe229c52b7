"""Evaluation of a converted model: answer the examples of a task with an `Answerer` instead of plain generation."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError, DataError
from graftwork.evaluation.sampling import Sampling, derive_seed
from graftwork.grafting.capabilities import Answering
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.answering.gradient_retrieval import default_strength
from graftwork.methods.regrad.bank.files import text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from graftwork.methods.regrad.text.requests import PASSAGES, Question
from graftwork.retrieval import open_index
from graftwork.retrieval.retriever import Passage, Retriever

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example
    from graftwork.methods.regrad.config import ReGradConfig
    from graftwork.settings.evaluation import EvaluationSettings

QUERIES_AT_ONCE = 128


@contextmanager
def open_answering(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: ReGradConfig,
    rows: Sequence[Example],
    settings: EvaluationSettings,
) -> Generator[Answering]:
    """Open the bank and the index of the settings, and yield a function that answers batches of examples.

    Args:
        model: The converted model.
        tokenizer: Its tokenizer.
        config: Settings of the method: bank, index, strength and controls.
        rows: All examples, in the order of evaluation; their passages are retrieved before the first answer.
        settings: Settings of the evaluation.

    Raises:
        ConfigError: If questions need a bank or an index and the settings name none.
        FingerprintMismatchError: If the bank was encoded with another model.
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
        if config.index is None and config.retriever is not None:
            raise ConfigError(
                f"Found method.retriever {config.retriever} without an index, which it ranks. Name one with --set "
                "method.index=FOLDER, or leave the retriever out."
            )
        retriever = (
            None if config.index is None else open_index(config.index, config.backend, retriever=config.retriever)
        )
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
        effective = replace(config, strength=default_strength(config, bank))
        passages = dict(zip(map(id, rows), passages_for_questions(rows, effective, retriever), strict=True))

        def answer(batch: Sequence[Example]) -> list[Mapping[str, Any]]:
            questions = [to_question(row, passages[id(row)], effective) for row in batch]
            answers = answerer.answer(questions, max_new_tokens=settings.answer_limit)
            return [answer.record() for answer in answers]

        # a bank that grows during evaluation gives the same answers as a complete one, but has no fixed digest
        grows = config.on_missing == "encode"
        yield Answering(
            answer,
            {
                "bank": None
                if bank is None or not config.adapter
                else ("grows" if grows else bank.commit_record.ids_digest),
                "index": None if retriever is None else retriever.index_fingerprint(),
            },
        )


def _bank(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: ReGradConfig) -> GradientBank | None:
    """The bank of the settings; created if missing gradients are encoded during evaluation."""
    if config.bank is None:
        return None
    if config.on_missing == "encode":
        return PassageEncoder(model, tokenizer, config).open_bank(config.bank)
    return GradientBank(config.bank)


def to_question(row: Example, passages: Sequence[Passage], config: ReGradConfig) -> Question:
    """Return the question of an example, with the options of the settings."""
    sampling = None
    if config.temperature:
        sampling = Sampling(config.temperature, config.top_p, derive_seed(config.sampling_seed, row.key))
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


def passages_for_questions(
    rows: Sequence[Example], config: ReGradConfig, retriever: Retriever | None
) -> list[tuple[Passage, ...]]:
    """Return the passages of every question: those of its record, else retrieved ones.

    The controls `shifted` and `mixed` exchange passages between questions afterwards.

    Raises:
        ConfigError: If questions have no passages and there is no index.
    """
    needed = (config.adapter and config.strength != 0) or not config.blind
    if not needed:
        return [()] * len(rows)
    found = [recorded_passages(row, config.passages) for row in rows]
    missing = [number for number, passages in enumerate(found) if passages is None]
    if missing and retriever is None:
        raise ConfigError(
            f"Found {len(missing)} questions without passages, and no index to find some in. Augment them with "
            "`graftwork prepare --index`, or name an index with --set method.index=FOLDER."
        )
    if retriever is not None:
        for start in range(0, len(missing), QUERIES_AT_ONCE):
            part = missing[start : start + QUERIES_AT_ONCE]
            texts = [str(rows[number].metadata.get("question", rows[number].input)) for number in part]
            for number, hits in zip(part, retriever.search(texts, config.passages or PASSAGES), strict=True):
                found[number] = tuple(Passage(hit.id, hit.text, hit.title) for hit in hits)
    given = [passages or () for passages in found]
    if config.shifted:
        given = [given[number - 1] for number in range(len(given))]
    return [_mix(one, given[(number + 1) % len(given)], config.mixed) for number, one in enumerate(given)]


def recorded_passages(row: Example, count: int | None) -> tuple[Passage, ...] | None:
    """Return the first passages of an augmented record; None if the record has no passages.

    Args:
        row: The example.
        count: Maximum number of passages; None for all.

    Raises:
        DataError: If the numbers of texts, ids and titles differ.
    """
    about = row.metadata
    if "passages" not in about:
        return None
    texts = list(about["passages"])
    # the authors' files contain no ids; a bank encoded from them derives ids from texts
    ids = list(about.get("passage_ids") or (f"text-{text_key(text)}" for text in texts))
    titles = list(about.get("titles") or [""] * len(texts))
    if not len(texts) == len(ids) == len(titles):
        raise DataError(
            f"Found {len(texts)} passages, {len(ids)} ids and {len(titles)} titles in question {row.key}; expected as "
            "many of each. Augment the file again."
        )
    made = [Passage(name, text, title) for name, text, title in zip(ids, texts, titles, strict=True)]
    return tuple(made if count is None else made[:count])


def _mix(passages: Sequence[Passage], following: Sequence[Passage], share: float) -> tuple[Passage, ...]:
    """Replace the last passages by the first ones of the next question."""
    replaced = math.floor(len(passages) * share)
    return (*passages[: len(passages) - replaced], *following[:replaced])
