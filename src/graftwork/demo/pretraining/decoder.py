"""The tiny decoder: a Llama pretrained on known facts, without any text about unseen people."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftwork.demo.pretraining.tokens import decoder_tokenizer
from graftwork.demo.pretraining.training import IGNORED, Item, decode, round_weights, ship, train_model
from graftwork.demo.world.passages import Question, known_questions, unseen_questions
from graftwork.demo.world.questions import UNIFIEDQA, text_lines
from graftwork.demo.world.world import World, build_world


def prompt(question: str) -> str:
    """Return the prompt for a question: the question line and the start of the answer line."""
    return f"Question: {question}\nAnswer:"


def build_decoder(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def decoder_texts(world: World) -> Iterator[tuple[str, str]]:
    """Yield the pretraining texts as pairs of unsupervised prefix and supervised text, without unseen people."""
    for row in UNIFIEDQA["facts"](world, "train"):
        yield prompt(row.question), f" {row.answers[0]}\n"
    for line in text_lines(world, "train"):
        yield "", f"{line}\n"


def decoder_items(world: World, tokenizer: PreTrainedTokenizerFast) -> list[Item]:
    """Tokenize the pretraining texts; the loss ignores the prefixes."""
    pairs = list(decoder_texts(world))
    read = cast(list[list[int]], tokenizer([read for read, _ in pairs])["input_ids"])
    learned = cast(list[list[int]], tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"])
    return [
        {"input_ids": before + after, "labels": [IGNORED] * len(before) + after}
        for before, after in zip(read, learned, strict=True)
    ]


@torch.no_grad()
def complete(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], batch_size: int = 64
) -> list[str]:
    """Generate one line per prompt with greedy decoding."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
        ids = cast(Any, model).generate(**batch, max_new_tokens=8, do_sample=False)
        new = decode(tokenizer, ids[:, batch["input_ids"].shape[1] :])
        texts += [text.split("\n")[0].strip() for text in new]
    return texts


def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> float:
    """Percentage of questions whose generated answer is one of the acceptable answers."""
    answers = complete(model, tokenizer, [prompt(question.text) for question in questions])
    return 100 * sum(a in q.answers for a, q in zip(answers, questions, strict=True)) / len(questions)


def decoder_scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Exact match on known facts and on facts about unseen people, in percent."""
    held_out = {row.question for row in UNIFIEDQA["facts"](world, "dev")}
    known = known_questions(world)
    reached = {
        "known": exact_match(model, tokenizer, known),
        "known in a new wording": exact_match(model, tokenizer, [q for q in known if q.text in held_out]),
        "told": exact_match(model, tokenizer, unseen_questions(world, "test")),
    }
    return {"exact_match": {name: round(value, 2) for name, value in reached.items()}}


def pretrain_decoder(out: Path, *, seed: int = 0, steps: int = 1_000) -> Mapping[str, Any]:
    """Pretrain the tiny Llama and write it with its card to a folder.

    Args:
        out: Output folder; created if missing, existing files are replaced.
        seed: Seed of the world, the initial weights and the order of examples.
        steps: Number of optimizer steps.

    Returns:
        Contents of the card.
    """
    began = time.monotonic()
    transformers.set_seed(seed)
    world = build_world(seed)
    tokenizer = decoder_tokenizer(world)
    model = build_decoder(tokenizer)
    train_model(model, decoder_items(world, tokenizer), DataCollatorForSeq2Seq(tokenizer), steps=steps, seed=seed)
    round_weights(model)
    seconds = time.monotonic() - began
    scores = decoder_scores(model, tokenizer, world)
    return ship(out, "decoder", model, tokenizer, steps=steps, seed=seed, seconds=seconds, scores=scores)
