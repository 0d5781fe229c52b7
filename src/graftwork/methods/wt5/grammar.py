"""Grammar of the valid answers of one example: a label, then spans of the source after separators.

Every state of the automaton has positions of the source, so that an answer is read from its tokens, without a search of
decoded text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from graftwork.core.example import Example
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.metrics.spans import Span
from graftwork.tasks.offsets import encode_texts
from graftwork.tasks.spans import WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABEL, _SEPARATOR, _COPY, _FREE, _END = range(5)
State = tuple[int, int, int]
"""Kind, index (of the label or the unit) and number of tokens so far."""

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


class Path(NamedTuple):
    """Meaning of the tokens that led to a state."""

    label: int = -1
    """Index of the label."""
    spans: tuple[Span, ...] = ()
    """Completed spans, as characters of the source."""
    begin: int = -1
    """First character of the open span."""

    def closed(self, end: int) -> Path:
        """Path after the open span has ended."""
        return Path(self.label, (*self.spans, (self.begin, end)))

    @property
    def order(self) -> tuple[int, int, tuple[Span, ...], int]:
        """Sort key among readings of the same tokens: without repeated spans, few spans, early positions."""
        repeated = sum(
            any(first <= start and end <= last for first, last in self.spans[:place])
            for place, (start, end) in enumerate(self.spans)
        )
        return repeated, len(self.spans), self.spans, self.begin


States = Mapping[State, Path]
"""States that the tokens so far can lead to, each with its best path."""
Move = tuple[int, State, Path]
"""Next token, the state after it, and its path."""


@dataclass(frozen=True)
class Grammar:
    """Nondeterministic automaton of the valid answers of one example."""

    labels: tuple[tuple[int, ...], ...]
    """Token ids of each label."""
    separator: tuple[int, ...]
    """Token ids of the separator."""
    units: tuple[Unit, ...] | None
    """Parts of the source from which explanations are copied; None for free-text explanations."""
    ends: tuple[int, ...]
    """Token ids that end a text; generation uses the first."""
    explain: bool = True
    """True if explanations are allowed."""

    @property
    def end(self) -> int:
        """Token id that ends a generated text."""
        return self.ends[0]

    @cached_property
    def start(self) -> States:
        """States before the first token."""
        return {(_LABEL, label, 0): Path(label) for label in range(len(self.labels))}

    @cached_property
    def _first(self) -> Mapping[int, Sequence[int]]:
        """Units by their first token: a span can start at each of them."""
        found: dict[int, list[int]] = {}
        for index, unit in enumerate(self.units or ()):
            found.setdefault(unit.ids[0], []).append(index)
        return found

    def moves(self, state: State, path: Path) -> Iterator[Move]:
        """Transitions of a state."""
        kind, index, count = state
        if kind == _LABEL:
            own = self.labels[index]
            if count < len(own):
                yield own[count], (_LABEL, index, count + 1), path
            else:
                yield from self._after(path)
        elif kind == _SEPARATOR:
            if count < len(self.separator):
                yield self.separator[count], (_SEPARATOR, 0, count + 1), path
            else:
                for token, units in self._first.items():
                    for unit in units:
                        yield token, (_COPY, unit, 1), path._replace(begin=(self.units or ())[unit].start)
        elif kind == _COPY:
            units = self.units or ()
            own = units[index].ids
            if count < len(own):
                yield own[count], (_COPY, index, count + 1), path
            else:
                yield from self._after(path.closed(units[index].end))
                for unit in units[index].following:
                    yield units[unit].ids[0], (_COPY, unit, 1), path
        elif kind == _END:
            yield self.end, state, path

    def _after(self, path: Path) -> Iterator[Move]:
        """Transitions after a complete label or span."""
        for end in self.ends:
            yield end, (_END, 0, 0), path
        if self.explain:
            yield self.separator[0], (_SEPARATOR, 0, 1), path

    def is_free(self, states: States) -> bool:
        """True if any token is allowed: after a separator of free-text explanations."""
        return self.units is None and any(
            kind == _FREE or (kind == _SEPARATOR and count == len(self.separator)) for kind, _, count in states
        )

    def allowed(self, states: States, left: int | None = None) -> set[int]:
        """Allowed next tokens.

        Args:
            states: Current states.
            left: Remaining tokens, including the next one; tokens after which the text cannot end within the limit are
                excluded, unless that excludes all. None for no limit.
        """
        moves = [move for state, path in states.items() for move in self.moves(state, path)]
        every = {token for token, _, _ in moves}
        if left is None:
            return every
        return {token for token, after, _ in moves if self._to_end(after) < left} or every

    def _to_end(self, state: State) -> int:
        """Minimal number of tokens to the end of the text from a state, including the end token."""
        kind, index, count = state
        if kind == _LABEL:
            return len(self.labels[index]) - count + 1
        if kind == _SEPARATOR:
            return len(self.separator) - count + self._shortest + 1
        if kind == _COPY:
            return len((self.units or ())[index].ids) - count + 1
        return 0 if kind == _END else 1

    @cached_property
    def _shortest(self) -> int:
        return min((len(unit.ids) for unit in self.units or ()), default=0)

    def advance(self, states: States, token: int) -> States:
        """States after one more token, each with its best path."""
        if self.is_free(states):
            return {(_FREE, 0, 0): Path(max(path.label for path in states.values()))}
        found: dict[State, Path] = {}
        for state, path in states.items():
            for option, after, behind in self.moves(state, path):
                if option == token and (after not in found or behind.order < found[after].order):
                    found[after] = behind
        return found

    def read(self, ids: Sequence[int]) -> Path | None:
        """Label and spans of a whole answer; None if it is not in the language.

        Args:
            ids: Token ids without the end of the text.
        """
        states = self.start
        for token in (*ids, self.end):
            states = self.advance(states, token)
            if not states:
                return None
        return min((path for (kind, _, _), path in states.items() if kind == _END), key=lambda one: one.order)

    def read_span(self, ids: Sequence[int], taken: Sequence[Span] = ()) -> Span | None:
        """Characters of one copied span; None if the tokens are no complete copy.

        Args:
            ids: Token ids between two separators.
            taken: Spans that are in use, which are avoided if the text occurs elsewhere.
        """
        states: States = {(_SEPARATOR, 0, len(self.separator)): Path(0, tuple(taken))}
        for token in (*ids, self.end):
            states = self.advance(states, token)
            if not states:
                return None
        return min(path for (kind, _, _), path in states.items() if kind == _END).spans[-1]


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


def grammar_of(
    tokenizer: PreTrainedTokenizerBase, row: Example, *, lead: str = "", ends: Sequence[int] = ()
) -> Grammar | None:
    """Build the grammar of an example; None if its labels are unknown.

    Args:
        tokenizer: Tokenizer of the model.
        row: The example.
        lead: Text before the first word of an answer; see `Spelling`.
        ends: Token ids that end an answer; the end-of-sequence token by default.
    """
    labels = row.metadata.get("choices")
    if not labels:
        return None
    spelling = Spelling(tokenizer, lead)
    source = row.metadata.get("source")
    return Grammar(
        labels=tuple(spelling.first(labels)),
        separator=spelling.later([SEPARATOR.strip()])[0],
        units=None if source is None else source_units(spelling, source),
        ends=tuple(ends) or (_token(tokenizer.eos_token_id),),
        explain=bool(row.metadata.get("explain", True)),
    )


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


def _token(value: object) -> int:
    return int(str(value))
