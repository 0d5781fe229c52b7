"""The tiny decoder: a Llama that knows what is known, reads what it is shown, and was never told of the told people."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftwork.demo.articles import articles
from graftwork.demo.passages import Passage, Question, known_questions, passage_on, passages, strangers, told_questions
from graftwork.demo.questions import UNIFIEDQA, text_lines
from graftwork.demo.sentences import RELATIONS
from graftwork.demo.tokens import decoder_tokenizer
from graftwork.demo.training import IGNORED, Item, round_weights, ship, train_model
from graftwork.demo.world import World, build_world

INVITATION = "Use these passages if they help."
"""Stands before passages in a prompt."""
_READING_ROWS = 20_000
_ASKED_TIMES = 6
"""How often a known fact is asked for in one pass over the reading rows."""


def prompt(question: str, read: Sequence[Passage] = ()) -> str:
    """The text before an answer: numbered passages if any, a question line, and the start of the answer line."""
    shown = [f"[{number}] {passage.title}\n{passage.text}\n" for number, passage in enumerate(read, start=1)]
    invitation = f"{INVITATION}\n" if shown else ""
    return f"{invitation}{''.join(shown)}Question: {question}\nAnswer:"


def build_decoder(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def decoder_texts(world: World) -> Iterator[tuple[str, str]]:
    """All that pretraining shows, as text that is only read and text that is learned; told people are in none of it.

    Known facts are said in running text and asked for without a passage. Reading is practised on strangers.
    """
    for row in UNIFIEDQA["facts"](world, "train") * _ASKED_TIMES:
        yield "", f"{prompt(row.question)} {row.answers[0]}\n"
    for line in text_lines(world, "train") * 2:
        yield "", f"{line}\n"
    for article in articles(world, "train"):
        text = " ".join(article.sentences).replace(" .", ".")
        yield "", f"{article.title}\n{text}\n"
    yield from _reading(world)


def decoder_items(world: World, tokenizer: PreTrainedTokenizerFast) -> list[Item]:
    """The texts as token ids."""
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
    """Generate greedily one line after every prompt."""
    model.eval()
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
        ids = cast(Any, model).generate(**batch, max_new_tokens=8, do_sample=False)
        new = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [text.split("\n")[0].strip() for text in new]
    return texts


def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    read: Mapping[str, Passage] | None = None,
) -> float:
    """Percentage of questions whose generated answer is acceptable.

    Args:
        model: Answers.
        tokenizer: Goes with it.
        questions: What is asked.
        read: Passages by title; the one on the subject is shown. None asks without a passage.
    """
    prompts = [prompt(question.text, [read[question.fact.subject]] if read else ()) for question in questions]
    answers = complete(model, tokenizer, prompts)
    return 100 * sum(a in q.answers for a, q in zip(answers, questions, strict=True)) / len(questions)


def decoder_scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Exact match on what is known, on what only passages tell, and on the same with the passage shown, in percent."""
    told = told_questions(world, "test")
    read = {passage.title: passage for passage in passages(world)}
    held_out = set(UNIFIEDQA["facts"](world, "dev"))
    known = [q for q in known_questions(world) if q.text in {row.question for row in held_out}]
    reached = {
        "known": exact_match(model, tokenizer, known_questions(world)),
        "known in a new wording": exact_match(model, tokenizer, known),
        "told": exact_match(model, tokenizer, told),
        "told, with the passage": exact_match(model, tokenizer, told, read),
    }
    return {"exact_match": {name: round(value, 2) for name, value in reached.items()}}


def pretrain_decoder(out: Path, *, seed: int = 0, steps: int = 3_000) -> Mapping[str, Any]:
    """Train the tiny Llama and write it, with its card, into a folder.

    Args:
        out: The folder; made if missing, files of the same names are replaced.
        seed: World, weights and order of training.
        steps: Optimizer steps.

    Returns:
        What the card says.
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


def _reading(world: World) -> Iterator[tuple[str, str]]:
    """Questions on one or two passages about strangers, short and long; only the answer is learned."""
    chance = random.Random(f"{world.seed}:decoder reading")
    people = strangers(world, "decoder", 2 * _READING_ROWS)
    for number in range(_READING_ROWS):
        shown = people[2 * number : 2 * number + chance.choice((1, 1, 1, 1, 2))]
        read = [passage_on(person, chance, facts=chance.randint(1, 5)) for person in shown]
        fact = chance.choice(chance.choice(read).facts)
        question = chance.choice(RELATIONS[fact.relation].ask).format(s=fact.subject)
        yield prompt(question, read), f" {fact.value}\n"
