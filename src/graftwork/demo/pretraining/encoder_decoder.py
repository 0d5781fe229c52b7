"""The tiny encoder–decoder: a T5 that knows what is known and can find a sentence in a text."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from graftwork.demo.pretraining.tokens import encoder_decoder_tokenizer
from graftwork.demo.pretraining.training import Item, round_weights, ship, train_model
from graftwork.demo.world.pairs import pairs
from graftwork.demo.world.questions import UNIFIEDQA, Row, said
from graftwork.demo.world.reviews import unlabelled_reviews
from graftwork.demo.world.world import Split, World, build_world

HELD_OUT = ("keywords", "yesno", "profile", "reading")
"""Question forms that pretraining never shows, so that there is something to fine-tune on."""
_SCENES = 1_000
"""Scenes of entailment pairs that are shown with gaps."""
_TEXT_SHARE = 0.2
"""Steps of the second stage."""


def build_encoder_decoder(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Make an untrained T5 of version 1.0: ungated ReLU feed-forward layers, tied embeddings."""
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
    """All that the two stages of pretraining show: facts, then facts and text.

    Facts are questions of the train splits, and sentences with a hidden value. From text without labels two things are
    learned: to fill gaps, and to find and copy the sentence that begins with given words. Shown from the start on, text
    keeps the facts from being learned.
    """
    facts = [row for name, rows_of in UNIFIEDQA.items() if name not in HELD_OUT for row in rows_of(world, "train")]
    facts += _hidden_values(world)
    return facts, [*facts, *_text_rows(world)]


def add_words(model: T5ForConditionalGeneration, count: int, *, seed: int) -> None:
    """Give a model random embeddings, as large as those it has, for words that its tokenizer has got in addition.

    Args:
        model: Changed in place.
        count: Words that it has afterwards.
        seed: Decides the new embeddings.
    """
    known = model.shared.weight.detach().clone()
    model.resize_token_embeddings(count, mean_resizing=False)
    noise = torch.randn(count - len(known), known.shape[1], generator=torch.Generator().manual_seed(seed))
    model.shared.weight.data.copy_(torch.cat([known, noise * known.std()]))


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
    """Generate greedily an answer for every input."""
    model.eval()
    texts = []
    for start in range(0, len(inputs), batch_size):
        batch = tokenizer(list(inputs[start : start + batch_size]), padding=True, return_tensors="pt")
        ids = cast(Any, model).generate(**batch, max_new_tokens=16, do_sample=False)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def exact_match(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Percentage of rows whose generated answer is one of the acceptable ones."""
    predictions = answer(model, tokenizer, [row.input for row in rows])
    return 100 * sum(text in row.answers for text, row in zip(predictions, rows, strict=True)) / len(rows)


def encoder_decoder_scores(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, world: World
) -> dict[str, Any]:
    """Exact match of every data set on what was not trained on, in percent."""
    splits: tuple[Split, ...] = ("dev", "test")
    reached = {
        name: {split: round(exact_match(model, tokenizer, rows_of(world, split)), 2) for split in splits}
        for name, rows_of in UNIFIEDQA.items()
    }
    return {"held_out": list(HELD_OUT), "exact_match": reached}


def pretrain_encoder_decoder(out: Path, *, seed: int = 0, steps: int = 5_000) -> Mapping[str, Any]:
    """Train the tiny T5 and write it, with its card, into a folder.

    Args:
        out: The folder; made if missing, files of the same names are replaced.
        seed: World, weights and order of training.
        steps: Optimizer steps; the last fifth sees text too.

    Returns:
        What the card says.
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
        for line in said(world, fact, "train"):
            shown = f" {line}".replace(f" {fact.value}", " <extra_id_0>", 1).strip()
            yield Row(shown, "", (f"<extra_id_0> {fact.value}",))


def _text_rows(world: World) -> Iterator[Row]:
    chance = random.Random(f"{world.seed}:encoder-decoder text")
    for review in unlabelled_reviews(world):
        text = " ".join(review.tokens)
        yield _with_gaps(text, chance)
        sentence = chance.choice(review.sentences)[:-1]
        yield Row(f"find: {' '.join(sentence[:2])} text: {text}", "", (" ".join(sentence),))
    scenes = [text for pair in pairs(world, "train") for text in (pair.premise, pair.hypothesis)]
    for text in chance.sample(scenes, _SCENES):
        yield _with_gaps(text, chance)


def _with_gaps(text: str, chance: random.Random) -> Row:
    """Hide some spans of one to five words, as T5 does."""
    words = text.split()
    shown: list[str] = []
    hidden: list[str] = []
    starts = sorted(chance.sample(range(len(words)), max(1, len(words) // 20)))
    end = 0
    for number, start in enumerate(starts):
        begin = max(start, end)
        shown += [*words[end:begin], f"<extra_id_{number}>"]
        end = min(begin + chance.randint(1, 5), len(words))
        hidden += [f"<extra_id_{number}>", *words[begin:end]]
    return Row(" ".join(shown + words[end:]), "", (" ".join(hidden),))
