"""Digests of tokenizers."""

from __future__ import annotations

from tokenizers import normalizers

from graftwork.core.digests import tokenizer_digest
from tiny_models import word_tokenizer


def test_the_digest_of_a_tokenizer_depends_on_its_rules_and_not_on_the_settings_of_the_last_call():
    digest = tokenizer_digest(word_tokenizer())
    used = word_tokenizer()
    used("w5 w6 w7", truncation=True, max_length=2)
    assert tokenizer_digest(used) == digest
    ruled = word_tokenizer()
    ruled.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert ruled.get_vocab() == used.get_vocab()
    assert tokenizer_digest(ruled) != digest


def test_the_digest_of_a_tokenizer_without_a_backend_depends_on_its_vocabulary():
    class Plain:
        special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012

        def __init__(self, **vocabulary: int) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    assert tokenizer_digest(Plain(a=1, b=2)) == tokenizer_digest(Plain(b=2, a=1))
    assert tokenizer_digest(Plain(a=1, b=2)) != tokenizer_digest(Plain(a=2, b=1))
