"""Tokenizers of the tiny models: one token per word of the offline world, characters for all other text."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from graftwork.demo.world.articles import articles
from graftwork.demo.world.pairs import pairs
from graftwork.demo.world.passages import multihop_questions, passages, unseen_questions
from graftwork.demo.world.questions import UNIFIEDQA, text_lines
from graftwork.demo.world.reviews import judged_sentences, reviews
from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import SPLITS, World

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
"""Words with a token of their own although pretraining does not contain them, so that fine-tuning does not split them
into characters."""
_PROMPT_WORDS = """
use help context document title text answer find give itself date number write full sentence exactly passages user
"""
"""Further words of that kind, from prompts around questions and passages."""
_CHARACTERS = ("▁", *string.ascii_lowercase, *string.digits, *string.punctuation)
_LINE_BREAK = "▁\n"


def encoder_decoder_tokenizer(world: World, *, facts_only: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer with T5's special tokens and an end token after every text; line breaks become spaces.

    Behaves like an untrained SentencePiece model: decoding returns the text exactly, in lower case. Words outside
    questions and facts have the last ids, so a model pretrained on facts alone can be extended.

    Args:
        world: World whose words become tokens.
        facts_only: Omit the words outside questions and facts.
    """
    sentinels = [f"<extra_id_{number}>" for number in range(_SENTINELS)]
    first = _pieces_of_facts(world)
    later = () if facts_only else tuple(piece for piece in _pieces_of(world) if piece not in set(first))
    tokenizer = _tokenizer(first, ["<pad>", "</s>", "<unk>", *sentinels], later=later)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_max_length=512,
    )


def encoder_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build a tokenizer with RoBERTa's special tokens around every text; line breaks become spaces.

    Args:
        world: World whose words become tokens.
    """
    tokenizer = _tokenizer(_pieces_of(world), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unknown=3)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )


def decoder_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build a tokenizer with Llama's start token before every text; line breaks are kept, because they end answers.

    Args:
        world: World whose words become tokens.
    """
    tokenizer = _tokenizer(_pieces_of(world), ["<unk>", "<s>", "</s>"], unknown=0, line_breaks=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
    )


def _tokenizer(
    words: Sequence[str],
    specials: Sequence[str],
    *,
    later: Sequence[str] = (),
    unknown: int = 2,
    line_breaks: bool = False,
) -> Tokenizer:
    pieces = [(token, 0.0) for token in specials]
    pieces += [(_LINE_BREAK, -1.0)] if line_breaks else []
    pieces += [(piece, -1.0) for piece in words]
    pieces += [(character, -8.0) for character in _CHARACTERS]
    pieces += [(piece, -1.0) for piece in later]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unknown))
    blanks = [normalizers.Replace(Regex(r"\s+"), " ")]
    if line_breaks:
        blanks = [normalizers.Replace(Regex(r"[^\S\n]+"), " "), normalizers.Replace(Regex(r" ?\n ?"), "\n")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), *blanks, *_strip(line_breaks)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if line_breaks:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        # every word-initial token decodes with a leading space, also after a line break; the replacement removes those
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.Fuse(),
                decoders.Replace(Regex(r" ?\n ?"), "\n"),
                decoders.Strip(" ", 1, 0),
            ]
        )
    cast(Any, tokenizer).add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def _strip(line_breaks: bool) -> list[normalizers.Normalizer]:
    return [] if line_breaks else [normalizers.Strip()]


def _fact_texts(world: World) -> Iterator[str]:
    """Yield questions, plain sentences and all acceptable answers."""
    for split in SPLITS:
        for rows_of in UNIFIEDQA.values():
            for row in rows_of(world, split):
                yield row.input
                yield row.answers[0]
        yield from text_lines(world, split)
    yield from (answer for relation in RELATIONS.values() for answer in relation.also)
    yield _COMMON_WORDS


def _texts(world: World) -> Iterator[str]:
    """Yield all texts that the writers can produce."""
    yield from _fact_texts(world)
    for split in SPLITS:
        yield from (sentence for article in articles(world, split) for sentence in article.sentences)
        yield from (review.text for review in reviews(world, split))
        for pair in pairs(world, split):
            yield from (pair.premise, pair.hypothesis, *pair.explanations)
        yield from (question.text for question in unseen_questions(world, split))
        yield from (question.text for question in multihop_questions(world, split))
    for split in ("train", "dev"):
        yield from (text for text, _ in judged_sentences(world, split))
    yield from (passage.text for passage in passages(world))
    yield _PROMPT_WORDS


@cache
def _pieces_of(world: World) -> tuple[str, ...]:
    return _split(_texts(world))


@cache
def _pieces_of_facts(world: World) -> tuple[str, ...]:
    return _split(_fact_texts(world))


def _split(texts: Iterable[str]) -> tuple[str, ...]:
    words = {word for text in texts for word in text.split()}
    # a word has two tokens: one after a space and one after an opening bracket
    found = {piece for word in words for piece in re.findall(r"^▁\([a-d]\)$|^▁\\n$|▁?[a-z]+|▁?[^a-z▁]", f"▁{word}")}
    return tuple(sorted(found - set(_CHARACTERS)))
