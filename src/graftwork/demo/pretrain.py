"""Make the tiny pretrained models of the offline world from its seed.

`python -m graftwork.demo.pretrain encoder_decoder -o DIR` repeats what made the shipped one; its `card.json` tells the
command, how long it took, and what the model reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import string
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from graftwork.demo.questions import UNIFIEDQA, Row, said, text_lines
from graftwork.demo.sentences import RELATIONS
from graftwork.demo.world import SPLITS, World, build_world

HELD_OUT = ("keywords", "yesno", "profile", "reading")
"""Question forms that pretraining never shows, so that there is something to fine-tune on."""
_SENTINELS = 8
_COMMON_WORDS = """
a about after again all also always an and another any anybody anyone anything are as at away bad be because been before
best better between big both but by can cannot choice claim comes contradiction could day did different do does done
each either entailment even ever every everyone evidence explain explanation false few film find first for found from
gave get give gives go goes good great had happened has have he her here him his how i if implies in into is it its just
keep knew know known last less like little long made make makes man many may me means mentions met might more most must
my name negative neither neutral never new nli no nobody none not nothing now of often old on one only or other others
our out over owns passage people person place plot positive premise hypothesis question read reason review right said
same says scene see sees sentence sentiment she should show so some somebody somewhere story talks tell than
that the their them then there these they thing things this those time to told too town true two under unknown until up
us very want was we well went were what when where which while who whole whose why will with woman word words work would
wrong year years yes yet you young your
"""
"""Get a piece of their own although pretraining never shows them, so that fine-tuning need not spell them."""
_CHARACTERS = ("▁", *string.ascii_lowercase, *string.digits, *string.punctuation)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one piece per word of the world, and characters for everything else.

    Its behaviour is that of a SentencePiece model without training: text comes back exactly, in lower case.

    Args:
        world: Supplies the words.

    Returns:
        A tokenizer with T5's special tokens.
    """
    specials = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(_SENTINELS))]
    pieces = [(token, 0.0) for token in specials]
    pieces += [(piece, -1.0) for piece in _pieces_of(world)]
    pieces += [(character, -8.0) for character in _CHARACTERS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=specials[3:],
        model_max_length=512,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
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


def pretraining_rows(world: World) -> list[Row]:
    """All that pretraining shows: questions of the train splits, and sentences with a hidden value."""
    rows = [row for name, rows_of in UNIFIEDQA.items() if name not in HELD_OUT for row in rows_of(world, "train")]
    return rows + list(_hidden_values(world))


class EncodedRows(Dataset[dict[str, list[int]]]):
    """Rows as token ids, made once."""

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> None:
        inputs = tokenizer([row.input for row in rows])["input_ids"]
        labels = tokenizer([row.answers[0] for row in rows])["input_ids"]
        self._items = [{"input_ids": i, "labels": o} for i, o in zip(inputs, labels, strict=True)]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """One row: input ids and labels."""
        return self._items[index]


def train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
) -> None:
    """Train a model on rows with the library's own trainer, reproducibly.

    Args:
        model: Changed in place.
        tokenizer: Turns rows into ids.
        rows: What is learned, in random order.
        steps: Optimizer steps.
        seed: Order of the rows.
        batch_size: Rows per step.
        learning_rate: Highest rate; it rises over the first 5 % of the steps and falls to zero on a cosine.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = Seq2SeqTrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=max(1, steps // 50),
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        trainer = Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=EncodedRows(rows, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        )
        # the trainer prints its log, and stdout is for the card
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    model.eval()


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


def scores(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, world: World
) -> dict[str, dict[str, float]]:
    """Exact match of every data set and split, in percent."""
    return {
        name: {split: round(exact_match(model, tokenizer, rows_of(world, split)), 2) for split in SPLITS}
        for name, rows_of in UNIFIEDQA.items()
    }


def pretrain_encoder_decoder(out: Path, *, seed: int = 0, steps: int = 4_000) -> Mapping[str, Any]:
    """Train the tiny T5 and write it, with its card, into a folder.

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
    tokenizer = build_tokenizer(world)
    model = build_model(tokenizer)
    train(model, tokenizer, pretraining_rows(world), steps=steps, seed=seed)
    seconds = time.monotonic() - began
    # what is measured is what is shipped: weights rounded to bfloat16
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    reached = scores(model.float(), tokenizer, world)
    settings = f"--steps {steps} --seed {seed} --threads {torch.get_num_threads()}"
    card = {
        "command": f"python -m graftwork.demo.pretrain encoder_decoder -o DIR {settings}",
        "seconds": round(seconds),
        "steps": steps,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "held_out": list(HELD_OUT),
        "exact_match": reached,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m graftwork.demo.pretrain", description=__doc__)
    parser.add_argument("model", choices=sorted(_MODELS))
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    card = _MODELS[options.model](options.out, seed=options.seed, steps=options.steps)
    print(json.dumps(card, indent=2))
    return 0


def _pieces_of(world: World) -> list[str]:
    texts = [
        f"{row.input} {row.answers[0]}"
        for rows_of in UNIFIEDQA.values()
        for split in SPLITS
        for row in rows_of(world, split)
    ]
    texts += [line for split in SPLITS for line in text_lines(world, split)]
    texts += [answer for relation in RELATIONS.values() for answer in relation.also]
    texts.append(_COMMON_WORDS)
    # a word is one piece after a space, and another after an opening bracket
    found = {
        piece
        for word in {word for text in texts for word in text.split()}
        for piece in re.findall(r"^▁\([a-d]\)$|^▁\\n$|▁?[a-z]+|▁?[^a-z▁]", f"▁{word}")
    }
    return sorted(found - set(_CHARACTERS))


def _hidden_values(world: World) -> Iterator[Row]:
    for fact in world.known_facts:
        for line in said(world, fact, "train"):
            shown = f" {line}".replace(f" {fact.value}", " <extra_id_0>", 1).strip()
            yield Row(shown, "", (f"<extra_id_0> {fact.value}",))


_MODELS = {"encoder_decoder": pretrain_encoder_decoder}


if __name__ == "__main__":
    raise SystemExit(main())
