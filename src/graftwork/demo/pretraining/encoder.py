"""The tiny encoder: a RoBERTa pretrained with masked language modelling on text of the offline world."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from graftwork.demo.pretraining.tokens import encoder_tokenizer
from graftwork.demo.pretraining.training import IGNORED, Item, round_weights, ship, train_model
from graftwork.demo.world.articles import articles
from graftwork.demo.world.pairs import pairs
from graftwork.demo.world.reviews import judged_sentences, unlabelled_reviews
from graftwork.demo.world.world import World, build_world

SHORT, LONG = 64, 512
"""Tokens per block in the first and second stage; the second stage trains the remaining positions."""
_LONG_SHARE = 0.2
_MASKED = 0.15


def build_encoder(tokenizer: PreTrainedTokenizerFast) -> RobertaForMaskedLM:
    """Return an untrained RoBERTa for texts of up to 512 tokens."""
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        # RoBERTa numbers positions from padding id + 1
        max_position_embeddings=LONG + 2,
        type_vocab_size=1,
        initializer_range=0.06,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = RobertaForMaskedLM(config)
    positions = model.roberta.embeddings.position_embeddings.weight
    # sinusoids instead of noise: neighbouring positions start out similar, also at positions that few texts reach
    positions.data.copy_(_sinusoids(*positions.shape) * config.initializer_range * math.sqrt(2))
    return model


def encoder_texts(world: World) -> list[str]:
    """Unlabelled text of the train split: articles, reviews, sentiment sentences and scenes."""
    texts = [f"{article.title} . {' '.join(article.sentences)}" for article in articles(world, "train")]
    texts += [" ".join(review.tokens) for review in unlabelled_reviews(world)]
    texts += [text for pair in pairs(world, "train") for text in (pair.premise, pair.hypothesis)]
    texts += [text for text, _ in judged_sentences(world, "train")]
    random.Random(f"{world.seed}:encoder texts").shuffle(texts)
    return texts


def blocks(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> list[list[int]]:
    """Concatenate texts with separators and cut them into blocks of equal length, each with a leading start token."""
    ids = cast(list[list[int]], tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    stream = [token for text in ids for token in (*text, cast(int, tokenizer.eos_token_id))]
    body = length - 1
    whole = range(0, len(stream) - body + 1, body)
    return [[cast(int, tokenizer.bos_token_id), *stream[start : start + body]] for start in whole]


@torch.no_grad()
def fill_gaps(
    model: RobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Sequence[int]], batch_size: int = 16
) -> dict[str, float]:
    """Mask 15 % of the tokens, with a fixed seed, and score the predictions at the masked positions.

    Returns:
        Perplexity and accuracy in percent.
    """
    rng = torch.Generator().manual_seed(0)
    model.eval()
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        ids = torch.tensor(rows[start : start + batch_size])  # [batch tokens]
        special = torch.isin(ids, torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id]))
        hidden = (torch.rand(ids.shape, generator=rng) < _MASKED) & ~special
        logits = cast(Tensor, model(input_ids=ids.masked_fill(hidden, cast(int, tokenizer.mask_token_id))).logits)
        labels = ids.masked_fill(~hidden, IGNORED)
        flat = logits.flatten(0, 1)  # [batch·tokens vocabulary]
        loss += float(torch.nn.functional.cross_entropy(flat, labels.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        count += int(hidden.sum())
    return {"perplexity": round(math.exp(loss / count), 3), "accuracy": round(100 * right / count, 2)}


def encoder_scores(model: RobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Perplexity and accuracy on masked tokens of held-out articles, in short and in long blocks."""
    texts = [" ".join(article.sentences) for article in articles(world, "dev")]
    return {
        "masked": {
            str(length): fill_gaps(model, tokenizer, blocks(tokenizer, texts, length)) for length in (SHORT, LONG)
        }
    }


def pretrain_encoder(out: Path, *, seed: int = 0, steps: int = 4_000) -> Mapping[str, Any]:
    """Pretrain the tiny RoBERTa and write it with its card to a folder.

    Args:
        out: Output folder; created if missing, existing files are replaced.
        seed: Seed of the world, the initial weights, the order of examples and the masking.
        steps: Number of optimizer steps; the last fifth uses long blocks.

    Returns:
        Contents of the card.
    """
    began = time.monotonic()
    transformers.set_seed(seed)
    world = build_world(seed)
    tokenizer = encoder_tokenizer(world)
    model = build_encoder(tokenizer)
    texts = encoder_texts(world)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=_MASKED)
    last = round(_LONG_SHARE * steps)
    stages = ((SHORT, steps - last, 32, 1e-3), (LONG, last, 4, 5e-4))
    for length, stage_steps, batch_size, learning_rate in stages:
        items: list[Item] = [{"input_ids": ids} for ids in blocks(tokenizer, texts, length)]
        train_model(
            model, items, collator, steps=stage_steps, seed=seed, batch_size=batch_size, learning_rate=learning_rate
        )
    round_weights(model)
    seconds = time.monotonic() - began
    scores = encoder_scores(model, tokenizer, world)
    return ship(out, "encoder", model, tokenizer, steps=steps, seed=seed, seconds=seconds, scores=scores)


def _sinusoids(count: int, width: int) -> Tensor:
    """Sinusoidal embeddings [count width]: sin(p·ω_i), cos(p·ω_i) with ω_i = 10000^(−2i / width)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)  # [width/2]
    angles = torch.arange(count)[:, None] * frequencies  # [count width/2]
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # [count width/2 2] → [count width]
