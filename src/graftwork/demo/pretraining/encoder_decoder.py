"""The tiny encoder–decoder: a T5 pretrained on known facts, span filling and copying sentences from a text."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from graftwork.demo.pretraining.tokens import encoder_decoder_tokenizer
from graftwork.demo.pretraining.training import Item, decode, round_weights, ship, train_model
from graftwork.demo.world.pairs import pairs
from graftwork.demo.world.questions import UNIFIEDQA, Row, fact_sentences
from graftwork.demo.world.reviews import unlabelled_reviews
from graftwork.demo.world.world import Split, World, build_world

HELD_OUT = ("keywords", "yesno", "profile", "reading")
"""Question formats excluded from pretraining, available for fine-tuning."""
_SCENES = 1_000
"""Number of entailment scenes used for span filling."""
_TEXT_SHARE = 0.2
"""Fraction of the steps spent in the second stage."""


def build_encoder_decoder(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Return an untrained T5 v1.0: ungated ReLU feed-forward layers, tied embeddings."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=768,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="relu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.tie_word_embeddings = True
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def pretraining_rows(world: World) -> tuple[list[Row], list[Row]]:
    """Training rows of the two pretraining stages: facts, then facts and text.

    Fact rows are questions of the train splits, and sentences with a masked value. Text rows need no labels: span
    filling, and copying the sentence that begins with given words. Text comes in the second stage only, because text
    from the start prevents the model from learning the facts.
    """
    facts = [row for name, rows_of in UNIFIEDQA.items() if name not in HELD_OUT for row in rows_of(world, "train")]
    facts += _hidden_values(world)
    return facts, [*facts, *_text_rows(world)]


def embeddings(model: T5ForConditionalGeneration) -> Tensor:
    """Shared input embeddings [vocabulary width] of a T5."""
    return cast(Tensor, cast(Any, model).shared.weight)


def add_words(model: T5ForConditionalGeneration, count: int, *, seed: int) -> None:
    """Extend the vocabulary of a model with random embeddings at the scale of the existing ones.

    Args:
        model: Model to change in place.
        count: Vocabulary size afterwards.
        seed: Seed of the new embeddings.
    """
    known = embeddings(model).detach().clone()  # [words width]
    model.resize_token_embeddings(count, mean_resizing=False)
    noise = torch.randn(count - len(known), known.shape[1], generator=torch.Generator().manual_seed(seed))
    embeddings(model).data.copy_(torch.cat([known, noise * known.std()]))  # [count width]


def _train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    *,
    steps: int,
    seed: int,
    learning_rate: float,
) -> None:
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    train_model(model, _items(rows, tokenizer), collator, steps=steps, seed=seed, learning_rate=learning_rate)
    round_weights(model)


def _items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Item]:
    inputs = cast(list[list[int]], tokenizer([row.input for row in rows])["input_ids"])
    labels = cast(list[list[int]], tokenizer([row.answers[0] for row in rows])["input_ids"])
    return [{"input_ids": i, "labels": o} for i, o in zip(inputs, labels, strict=True)]


@torch.no_grad()
def answer(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, inputs: Sequence[str], batch_size: int = 128
) -> list[str]:
    """Generate one answer per input with greedy decoding."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(inputs), batch_size):
        batch = tokenizer(list(inputs[start : start + batch_size]), padding=True, return_tensors="pt")
        ids = cast(Any, model).generate(**batch, max_new_tokens=16, do_sample=False)
        texts += decode(tokenizer, ids)
    return texts


def exact_match(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Percentage of rows whose generated answer is one of the acceptable answers."""
    predictions = answer(model, tokenizer, [row.input for row in rows])
    return 100 * sum(text in row.answers for text, row in zip(predictions, rows, strict=True)) / len(rows)


def encoder_decoder_scores(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, world: World
) -> dict[str, Any]:
    """Exact match on the dev and test split of every data set, in percent."""
    splits: tuple[Split, ...] = ("dev", "test")
    reached = {
        name: {split: round(exact_match(model, tokenizer, rows_of(world, split)), 2) for split in splits}
        for name, rows_of in UNIFIEDQA.items()
    }
    return {"held_out": list(HELD_OUT), "exact_match": reached}


def pretrain_encoder_decoder(out: Path, *, seed: int = 0, steps: int = 5_000) -> Mapping[str, Any]:
    """Pretrain the tiny T5 and write it with its card to a folder.

    Args:
        out: Output folder; created if missing, existing files are replaced.
        seed: Seed of the world, the initial weights and the order of examples.
        steps: Number of optimizer steps; the last fifth also uses text.

    Returns:
        Contents of the card.
    """
    began = time.monotonic()
    transformers.set_seed(seed)
    world = build_world(seed)
    facts, facts_and_text = pretraining_rows(world)
    last = round(_TEXT_SHARE * steps)
    tokenizer = encoder_decoder_tokenizer(world, facts_only=True)
    model = build_encoder_decoder(tokenizer)
    _train(model, tokenizer, facts, steps=steps - last, seed=seed, learning_rate=2e-3)
    tokenizer = encoder_decoder_tokenizer(world)
    add_words(model, len(tokenizer), seed=seed)
    _train(model, tokenizer, facts_and_text, steps=last, seed=seed, learning_rate=1e-3)
    seconds = time.monotonic() - began
    scores = encoder_decoder_scores(model, tokenizer, world)
    return ship(out, "encoder_decoder", model, tokenizer, steps=steps, seed=seed, seconds=seconds, scores=scores)


def _hidden_values(world: World) -> Iterator[Row]:
    for fact in world.known_facts:
        for line in fact_sentences(world, fact, "train"):
            shown = f" {line}".replace(f" {fact.value}", " <extra_id_0>", 1).strip()
            yield Row(shown, "", (f"<extra_id_0> {fact.value}",))


def _text_rows(world: World) -> Iterator[Row]:
    rng = random.Random(f"{world.seed}:encoder-decoder text")
    for review in unlabelled_reviews(world):
        text = " ".join(review.tokens)
        yield _with_gaps(text, rng)
        sentence = rng.choice(review.sentences)[:-1]
        yield Row(f"find: {' '.join(sentence[:2])} text: {text}", "", (" ".join(sentence),))
    scenes = [text for pair in pairs(world, "train") for text in (pair.premise, pair.hypothesis)]
    for text in rng.sample(scenes, _SCENES):
        yield _with_gaps(text, rng)


def _with_gaps(text: str, rng: random.Random) -> Row:
    """Replace spans of one to five words by sentinels, as in T5 pretraining."""
    words = text.split()
    shown: list[str] = []
    hidden: list[str] = []
    starts = sorted(rng.sample(range(len(words)), max(1, len(words) // 20)))
    end = 0
    for number, start in enumerate(starts):
        begin = max(start, end)
        shown += [*words[end:begin], f"<extra_id_{number}>"]
        end = min(begin + rng.randint(1, 5), len(words))
        hidden += [f"<extra_id_{number}>", *words[begin:end]]
    return Row(" ".join(shown + words[end:]), "", (" ".join(hidden),))
