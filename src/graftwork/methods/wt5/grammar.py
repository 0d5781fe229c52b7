"""Grammar of the valid answers of one example: a label and spans of the source, in the order of its prompt.

    label_first   label (separator span)*
    reason_first  (separator span)* mark label
    rationale     span (separator span)*

Every state of the automaton has positions of the source, so that an answer is read from its tokens, without a search of
decoded text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from graftwork.core.example import Example
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.methods.wt5.orders import LABEL_MARK, AnswerOrder, answer_order
from graftwork.methods.wt5.spelling import Spelling, Unit, source_units
from graftwork.metrics.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABEL, _SEPARATOR, _COPY, _FREE, _END, _MARK = range(6)
State = tuple[int, int, int]
"""Kind, index (of the label, the unit or the spelling) and number of tokens so far."""
_LATER, _FIRST = range(2)
"""Spellings of separator and mark: after other words, and at the beginning of an answer."""


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
    order: AnswerOrder = "label_first"
    """Order of label and explanations."""
    opening: tuple[int, ...] = ()
    """Token ids of the separator at the beginning of an answer (reason_first)."""
    marks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Token ids of the mark before the label, after other words and at the beginning of an answer (reason_first)."""
    openers: tuple[Unit, ...] = ()
    """Units as they are spelled at the beginning of an answer (rationale)."""

    @property
    def end(self) -> int:
        """Token id that ends a generated text."""
        return self.ends[0]

    @property
    def closing(self) -> int:
        """Token id that follows the last explanation."""
        return self.marks[_LATER][0] if self.order == "reason_first" else self.end

    def reasons(self, ids: Sequence[int]) -> list[list[int]]:
        """Token ids of the explanations of an unfinished answer, the last of which may be incomplete."""
        parts: list[list[int]] = [[]]
        place = len(self.opening) if tuple(ids[: len(self.opening)]) == self.opening else 0
        while place < len(ids):
            if tuple(ids[place : place + len(self.separator)]) == self.separator:
                parts.append([])
                place += len(self.separator)
            else:
                parts[-1].append(ids[place])
                place += 1
        return parts[1:] if self.order == "label_first" else parts

    @cached_property
    def start(self) -> States:
        """States before the first token."""
        if self.order == "rationale":
            return {(_SEPARATOR, _FIRST, 0): Path()}
        if self.order == "reason_first":
            spans = {(_SEPARATOR, _FIRST, 0): Path()} if self._explains else {}
            return {**spans, (_MARK, _FIRST, 0): Path()}
        return {(_LABEL, label, 0): Path(label) for label in range(len(self.labels))}

    @property
    def _explains(self) -> bool:
        """True if a span can follow: a source without a unit has none."""
        return self.explain and self.units != ()

    @cached_property
    def _separators(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.separator, self.opening

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
                yield from self._after(path, labelled=True)
        elif kind == _SEPARATOR:
            own = self._separators[index]
            if count < len(own):
                yield own[count], (_SEPARATOR, index, count + 1), path
            else:
                yield from self._spans(path, opening=not own)
        elif kind == _MARK:
            own = self.marks[index]
            if count < len(own):
                yield own[count], (_MARK, index, count + 1), path
            else:
                for label, ids in enumerate(self.labels):
                    yield ids[0], (_LABEL, label, 1), path._replace(label=label)
        elif kind == _COPY:
            own = self._unit(index)
            if count < len(own.ids):
                yield own.ids[count], (_COPY, index, count + 1), path
            else:
                yield from self._after(path.closed(own.end))
                for unit in own.following:
                    yield self._unit(unit).ids[0], (_COPY, unit, 1), path
        elif kind == _FREE and self.order == "reason_first":
            yield self.marks[_LATER][0], (_MARK, _LATER, 1), path
        elif kind == _END:
            yield self.end, state, path

    def _unit(self, index: int) -> Unit:
        """A unit, or one at the beginning of an answer, which are counted after all others."""
        units = self.units or ()
        return units[index] if index < len(units) else self.openers[index - len(units)]

    def _spans(self, path: Path, *, opening: bool) -> Iterator[Move]:
        """Beginnings of spans."""
        if opening:
            for index, unit in enumerate(self.openers, len(self.units or ())):
                yield unit.ids[0], (_COPY, index, 1), path._replace(begin=unit.start)
            # without a span, an explanation is empty
            if self.units == ():
                yield from ((end, (_END, 0, 0), path) for end in self.ends)
            return
        if self.units is None and self.order == "reason_first":
            yield self.marks[_LATER][0], (_MARK, _LATER, 1), path
        for token, units in self._first.items():
            for unit in units:
                yield token, (_COPY, unit, 1), path._replace(begin=(self.units or ())[unit].start)

    def _after(self, path: Path, *, labelled: bool = False) -> Iterator[Move]:
        """Transitions after a complete label or span."""
        last = self.order != "reason_first" or labelled
        if last:
            for end in self.ends:
                yield end, (_END, 0, 0), path
        else:
            yield self.marks[_LATER][0], (_MARK, _LATER, 1), path
        if self._explains and not (labelled and self.order == "reason_first"):
            yield self.separator[0], (_SEPARATOR, _LATER, 1), path

    def is_free(self, states: States) -> bool:
        """True if any token can follow: after a separator of free-text explanations."""
        return self.units is None and any(
            kind == _FREE or (kind == _SEPARATOR and count == len(self._separators[index]))
            for kind, index, count in states
        )

    def free_before(self, states: States, left: int | None) -> bool:
        """True if any token but an end is allowed next: in a free text that leaves room for the label after it.

        Args:
            states: Current states.
            left: Remaining tokens, including the next one; None for no limit.
        """
        room = left is None or self._to_end((_FREE, 0, 0)) < left
        return self.order == "reason_first" and self.is_free(states) and room

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
        later = self._label_after
        if kind == _LABEL:
            return len(self.labels[index]) - count + 1
        if kind == _MARK:
            return len(self.marks[index]) - count + later - len(self.marks[_LATER]) + 1
        if kind == _SEPARATOR:
            return len(self._separators[index]) - count + self._shortest + later + 1
        if kind == _COPY:
            return len(self._unit(index).ids) - count + later + 1
        return 0 if kind == _END else later + 1

    @cached_property
    def _label_after(self) -> int:
        """Minimal number of tokens of mark and label after an explanation; 0 if it ends the answer."""
        return len(self.marks[_LATER]) + min(map(len, self.labels)) if self.order == "reason_first" else 0

    @cached_property
    def _shortest(self) -> int:
        return min((len(unit.ids) for unit in self.units or ()), default=0)

    def advance(self, states: States, token: int) -> States:
        """States after one more token, each with its best path."""
        found: dict[State, Path] = {}
        if self.is_free(states):
            known = max(path.label for path in states.values())
            if self.order != "reason_first":
                return {(_FREE, 0, 0): Path(known)}
            # a free text goes on until the first mark
            found[_FREE, 0, 0] = Path()
            states = {state: path for state, path in states.items() if state[0] == _MARK} | {(_FREE, 0, 0): Path()}
        for state, path in states.items():
            for option, after, behind in self.moves(state, path):
                if option == token and (after not in found or behind.order < found[after].order):
                    found[after] = behind
        marked = (state for state in found if state[0] == _MARK and state[2] == len(self.marks[state[1]]))
        if self.units is None and (mark := next(marked, None)) is not None:
            return {mark: found[mark]}
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
        states: States = {(_SEPARATOR, _LATER, len(self.separator)): Path(0, tuple(taken))}
        for token in ids:
            states = self.advance(states, token)
        whole = [
            path.closed(self._unit(index).end)
            for (kind, index, count), path in states.items()
            if kind == _COPY and count == len(self._unit(index).ids)
        ]
        return min(whole).spans[-1] if whole else None


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
    source, order = row.metadata.get("source"), answer_order(row)
    units = None if source is None else source_units(spelling, source)
    words = [SEPARATOR.strip(), LABEL_MARK]
    separator, mark = spelling.later(words)
    first, first_mark = spelling.first(words)
    openers: tuple[Unit, ...] = ()
    if order == "rationale" and units and source is not None:
        texts = [source[unit.start : unit.end] for unit in units]
        spelled = spelling.first(texts)
        openers = tuple(unit._replace(ids=ids) for unit, ids in zip(units, spelled, strict=True) if ids)
    return Grammar(
        labels=tuple((spelling.later if order == "reason_first" else spelling.first)(labels)),
        separator=separator,
        units=units,
        ends=tuple(ends) or (_token(tokenizer.eos_token_id),),
        explain=bool(row.metadata.get("explain", True)),
        order=order,
        opening=first if order == "reason_first" else (),
        marks=(mark, first_mark) if order == "reason_first" else ((), ()),
        openers=openers,
    )


def _token(value: object) -> int:
    return int(str(value))
