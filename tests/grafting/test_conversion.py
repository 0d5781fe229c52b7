"""Tokenizers of converted models."""

from __future__ import annotations

from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.topk import TopK
from tiny_models import tiny_model, word_tokenizer


def test_a_conversion_keeps_the_tokenizer_and_a_given_one_replaces_it():
    first, second = word_tokenizer(), word_tokenizer()
    plain = convert(tiny_model("t5"), TopK(feed_forward_k=4), tokenizer=first)
    assert plain.tokenizer is first
    assert convert(plain, TopK(feed_forward_k=2)).tokenizer is first
    assert convert(plain, TopK(feed_forward_k=2), tokenizer=second).tokenizer is second
    assert convert(Converted(tiny_model("t5")), TopK(feed_forward_k=4), tokenizer=first).tokenizer is first
