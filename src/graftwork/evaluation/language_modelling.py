"""Loss, perplexity and accuracy of the next or the masked token on running text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from graftwork.core.example import Example, Examples
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError
from graftwork.grafting.converted import Converted
from graftwork.metrics.results import ResultRow
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import IGNORED_LABEL
from graftwork.training.running_text import TextBatch, TextChunks, objective_of, text_data

MASK_SEED = 0
"""Seed of the masks, which depend on it and the chunk number only: all variants of a model predict the same ones."""


MEASURED_CHUNKS = 8
"""Number of chunks on which a method's own numbers are measured."""


def text_row(
    converted: Converted,
    task: str,
    examples: Examples,
    settings: EvaluationSettings,
    name: str,
    point: Mapping[str, Any],
    seed: int,
) -> ResultRow:
    """Score a model on one task of running text, with progress and time.

    Args:
        converted: The model and its tokenizer.
        task: Name of the task.
        examples: Lines of text.
        settings: Chunk length, number of chunks, batch size.
        name: Label of the result.
        point: Settings that the result belongs to, in a sweep.
        seed: Seed of the run, for the record.
    """
    with Progress(f"{task} ({name})", total=settings.limit or 0) as progress:
        started = time.perf_counter()
        scores, size = score_text(converted, examples.rows, settings, advance=progress.advance)
        seconds = time.perf_counter() - started
    return ResultRow(
        task=task,
        split=examples.split,
        label=name,
        scores=scores,
        size=size,
        settings=dict(point),
        seed=seed,
        seconds=round(seconds, 3),
        higher_is_better={"perplexity": False, "loss": False, "token_accuracy": True},
    )


def text_batch(converted: Converted, rows: Sequence[Example], settings: EvaluationSettings) -> dict[str, Any]:
    """Return the first chunks as one batch on the model's device, for a method's measurements."""
    chunks, collate = text_chunks(converted, rows, settings)
    batch = collate([chunks[index] for index in range(min(len(chunks), MEASURED_CHUNKS))])
    return {key: value.to(pretrained(converted.model).device) for key, value in batch.items()}


def text_chunks(
    converted: Converted, rows: Sequence[Example], settings: EvaluationSettings
) -> tuple[TextChunks, TextBatch]:
    """Cut running text into chunks for evaluation, at most `limit`.

    Raises:
        ConfigError: If the model has no tokenizer.
    """
    if converted.tokenizer is None:
        raise ConfigError("Found a model without a tokenizer. Pass tokenizer= to graftwork.convert.")
    chunks, collate = text_data(
        rows, converted.model, converted.tokenizer, max_tokens=settings.input_limit, seed=MASK_SEED
    )
    if settings.limit is not None:
        chunks.chunks = chunks.chunks[: settings.limit]
    return chunks, collate


def score_text(
    converted: Converted,
    rows: Sequence[Example],
    settings: EvaluationSettings,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, float], int]:
    """Compute loss, perplexity and accuracy of a model on running text.

    Args:
        converted: The model and its tokenizer.
        rows: Lines of text, in order.
        settings: Length of chunks, their number and the batch size.
        advance: Called with the number of chunks that were scored.

    Returns:
        Scores by name, and the number of chunks.

    Raises:
        ConfigError: If the model has no language-model head.
    """
    objective_of(converted.model)
    chunks, collate = text_chunks(converted, rows, settings)
    every = range(len(chunks))
    return score_chunks(converted, chunks, collate, every, batch_size=settings.batch_size, advance=advance), len(chunks)


@torch.no_grad()
def score_chunks(
    converted: Converted,
    chunks: TextChunks,
    collate: TextBatch,
    numbers: Sequence[int],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Compute loss, perplexity and accuracy over some chunks of running text.

    Args:
        converted: A model with a language-model head.
        chunks: Chunks of tokens.
        collate: Collator that adds labels.
        numbers: Indices of the chunks to score.
        batch_size: Chunks in a batch.
        advance: Called with the number of chunks that were scored.
    """
    causal = objective_of(converted.model) == "causal"
    device = pretrained(converted.model).device
    converted.model.eval()
    loss, right, tokens = 0.0, 0, 0
    for start in range(0, len(numbers), batch_size):
        chosen = numbers[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate([chunks[index] for index in chosen]).items()}
        labels = batch.pop("labels")
        logits = converted.model(**batch).logits
        logits, labels = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
        counted = labels != IGNORED_LABEL
        picked, expected = logits[counted].float(), labels[counted]
        loss += float(F.cross_entropy(picked, expected, reduction="sum").double())
        right += int((picked.argmax(-1) == expected).sum())
        tokens += int(counted.sum())
        advance(len(chosen))
    mean = loss / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": perplexity, "loss": mean, "token_accuracy": 100.0 * right / tokens}
