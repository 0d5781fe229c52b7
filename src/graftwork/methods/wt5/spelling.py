"""Token ids of texts inside an answer, and the parts of a source that an answer can copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from graftwork.metrics.spans import Span
from graftwork.tasks.offsets import encode_texts
from graftwork.tasks.spans import WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANY = 6
"""Number of words between white space from which only their beginnings, ends and single words are units."""


class Unit(NamedTuple):
    """Part of a white-space word that can be copied: all of it, or from one of its word boundaries to another."""

    ids: tuple[int, ...]
    """Token ids after a space."""
    start: int
    """First character in the source."""
    end: int
    """Character after the last one."""
    following: tuple[int, ...]
    """Indices of the units that can continue a span."""


@dataclass(frozen=True)
class Spelling:
    """Token ids of texts at the beginning of an answer and after other words.

    Args:
        tokenizer: Tokenizer of the model.
        lead: Text before the first word of an answer: a space in a decoder's row, else nothing.
        escape: False for texts that contain no control tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    lead: str = ""
    escape: bool = True

    def first(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids at the beginning of an answer."""
        led = [self.lead + text for text in texts]
        return [tuple(ids) for ids in encode_texts(self.tokenizer, led, automatic=False, escape=self.escape)]

    def later(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids after a word and a space."""
        # encoded after another word, because tokenizers attach the space to different sides
        (before,) = encode_texts(self.tokenizer, ["x"], automatic=False, escape=False)
        joined = [f"x {text}" for text in texts]
        found = encode_texts(self.tokenizer, joined, automatic=False, escape=self.escape)
        return [tuple(ids[len(before) :]) for ids in found]


def pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool = False, escape: bool = True
) -> tuple[int, ...]:
    """Token ids of a word or phrase at the start of a target (`first`) or after other words. See `Spelling`."""
    spelling = Spelling(tokenizer, escape=escape)
    return (spelling.first if first else spelling.later)([text])[0]


def source_units(spelling: Spelling, source: str) -> tuple[Unit, ...]:
    """Units of a source: its white-space words, and their parts between word boundaries.

    A unit without a token, whose characters are all missing from the vocabulary, is skipped by a copy.

    Args:
        spelling: Token ids of texts.
        source: The source.
    """
    parts: list[list[tuple[int, int, bool, bool]]] = []
    for found in re.finditer(r"\S+", source):
        inner = [(match.start(), match.end()) for match in WORDS.finditer(source, found.start(), found.end())]
        parts.append([(s, e, s == found.start(), e == found.end()) for s, e in _ranges(inner)])
    texts = list(dict.fromkeys(source[s:e] for word in parts for s, e, _, _ in word))
    spelled = dict(zip(texts, spelling.later(texts), strict=True))
    found_units: list[tuple[tuple[int, ...], int, int, int]] = []
    entries: list[list[int]] = []
    for number, word in enumerate(parts):
        entries.append([])
        for s, e, begins, ends in word:
            ids = spelled[source[s:e]]
            if ids:
                if begins:
                    entries[number].append(len(found_units))
                found_units.append((ids, s, e, number + 1 if ends else len(parts)))
    # a word without a token is passed over
    for number in reversed(range(len(parts) - 1)):
        entries[number] = entries[number] or entries[number + 1]
    following = [*map(tuple, entries), ()]
    return tuple(Unit(ids, s, e, following[after]) for ids, s, e, after in found_units)


def _ranges(inner: Sequence[Span]) -> Iterable[Span]:
    """Ranges from the beginning of a word to the end of the same or a later one."""
    if len(inner) <= _MANY:
        return [(s, e) for place, (s, _) in enumerate(inner) for _, e in inner[place:]]
    start, end = inner[0][0], inner[-1][1]
    return dict.fromkeys([*((start, e) for _, e in inner), *((s, end) for s, _ in inner), *inner])
