"""Label probabilities, and generation that can only write a label and spans of the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.example import Example
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.surgery.sites import pretrained
from graftwork.tasks.eraser import document_tokens
from graftwork.training.encoding import IGNORED_LABEL, PadBatch, padding_id

_LABEL, _AFTER, _SEPARATOR, _COPY, _FREE, _END = range(6)
State = tuple[int, int, int]
"""Kind of state, and two numbers that say where in it."""


def pieces(tokenizer: Any, text: str, *, first: bool = False) -> tuple[int, ...]:
    """Token ids of a word or phrase, at the beginning of a target or behind other words."""
    if first:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    # measured behind another word, because some tokenizers give the space to one side and some to the other
    before = tokenizer("x", add_special_tokens=False)["input_ids"]
    return tuple(tokenizer(f"x {text}", add_special_tokens=False)["input_ids"][len(before) :])


@dataclass(frozen=True)
class Grammar:
    """What may be written for one example: a label, then reasons, each behind the separator.

    Followed as a set of states, because the next piece can belong to several places of the source.
    """

    labels: tuple[tuple[int, ...], ...]
    """Pieces of each label."""
    separator: tuple[int, ...]
    words: tuple[tuple[int, ...], ...] | None
    """Pieces of each word of the source, from which reasons are copied; None where reasons are free text."""
    end: int
    """The token that ends a text."""
    explain: bool = True
    """Whether reasons may follow."""

    @cached_property
    def start(self) -> frozenset[State]:
        """The states before the first piece."""
        return frozenset((_LABEL, label, 0) for label in range(len(self.labels)))

    @cached_property
    def _first_pieces(self) -> Mapping[int, frozenset[State]]:
        """States behind the first piece of any word: a span can start at each."""
        found: dict[int, set[State]] = {}
        for word, own in enumerate(self.words or ()):
            if own:
                found.setdefault(own[0], set()).add((_COPY, word, 1))
        return {piece: frozenset(states) for piece, states in found.items()}

    def options(self, state: State) -> Iterable[tuple[int, Iterable[State]]]:
        """(next piece, states behind it) for everything that may follow a state."""
        kind, one, other = state
        if kind == _LABEL and other < len(self.labels[one]):
            yield self.labels[one][other], [(_LABEL, one, other + 1)]
        elif kind == _LABEL:
            yield from self.options((_AFTER, 0, 0))
        elif kind == _AFTER:
            yield self.end, [(_END, 0, 0)]
            if self.explain:
                yield self.separator[0], [(_SEPARATOR, 1, 0)]
        elif kind == _SEPARATOR and one < len(self.separator):
            yield self.separator[one], [(_SEPARATOR, one + 1, 0)]
        elif kind == _SEPARATOR:
            yield from self._first_pieces.items()
        elif kind == _COPY:
            own = (self.words or ())[one]
            if other < len(own):
                yield own[other], [(_COPY, one, other + 1)]
            else:
                yield from self.options((_AFTER, 0, 0))
                yield from self._next_word(one + 1)
        elif kind == _END:
            yield self.end, [state]

    def _next_word(self, word: int) -> Iterable[tuple[int, Iterable[State]]]:
        words = self.words or ()
        # a word whose characters the vocabulary lacks altogether has no piece and is passed over
        while word < len(words) and not words[word]:
            word += 1
        if word < len(words):
            yield words[word][0], [(_COPY, word, 1)]

    def is_free(self, states: frozenset[State]) -> bool:
        """Whether anything may follow: behind a separator where reasons are free text."""
        return self.words is None and any(
            kind == _FREE or (kind == _SEPARATOR and one == len(self.separator)) for kind, one, _ in states
        )

    def allowed(self, states: frozenset[State], left: int | None = None) -> set[int]:
        """The pieces that may come next.

        Args:
            states: Where the text stands.
            left: Pieces that may still be written, the next one included; those behind which the text could not end
                in time are left out, unless none can. None for no limit.
        """
        options = [option for state in states for option in self.options(state)]
        every = {piece for piece, _ in options}
        if left is None:
            return every
        in_time = {piece for piece, behind in options if any(self._to_end(after) < left for after in behind)}
        return in_time or every

    def _to_end(self, state: State) -> int:
        """The fewest pieces, the end's included, with which a text can end from a state."""
        kind, one, other = state
        if kind == _LABEL:
            return len(self.labels[one]) - other + 1
        if kind == _SEPARATOR:
            return len(self.separator) - one + self._shortest + 1
        if kind == _COPY:
            return len((self.words or ())[one]) - other + 1
        return 0 if kind == _END else 1

    @cached_property
    def _shortest(self) -> int:
        return min((len(word) for word in self.words or () if word), default=0)

    def advance(self, states: frozenset[State], piece: int) -> frozenset[State]:
        """The states behind one more piece."""
        if self.is_free(states):
            return frozenset({(_FREE, 0, 0)})
        return frozenset(
            after for state in states for option, behind in self.options(state) if option == piece for after in behind
        )


def grammar_of(tokenizer: Any, row: Example) -> Grammar | None:
    """The grammar of an example; None if its labels are not known."""
    labels = row.metadata.get("choices")
    if not labels:
        return None
    source = row.metadata.get("source")
    words = None if source is None else tuple(pieces(tokenizer, word) for word in document_tokens(source))
    return Grammar(
        labels=tuple(pieces(tokenizer, label, first=True) for label in labels),
        separator=pieces(tokenizer, SEPARATOR.strip()),
        words=words,
        end=int(tokenizer.eos_token_id),
        explain=bool(row.metadata.get("explain", True)),
    )


class GrammarProcessor:
    """Makes every piece impossible that the grammar of its row does not allow: a logits processor of `generate`.

    A text ends in time, with a whole span; and it ends at a span that it has given before, because a small model that
    repeats itself goes on doing so.

    Args:
        grammars: One grammar for each row of the batch; None leaves a row free.
        max_new_tokens: Pieces that may be written; None for no limit.
    """

    def __init__(self, grammars: Sequence[Grammar | None], max_new_tokens: int | None = None) -> None:
        self.grammars = grammars
        self.max_new_tokens = max_new_tokens
        self._states: list[dict[tuple[int, ...], frozenset[State]]] = [{} for _ in grammars]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows×beams vocabulary] with minus infinity for what may not follow."""
        beams = len(input_ids) // len(self.grammars)
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        for number, ids in enumerate(input_ids.tolist()):
            grammar = self.grammars[number // beams]
            if grammar is None:
                continue
            # the first token is the decoder's start
            states = self._follow(number // beams, grammar, tuple(ids[1:]))
            left = None if self.max_new_tokens is None else self.max_new_tokens - (len(ids) - 1)
            allowed = grammar.allowed(states, left)
            if grammar.end in allowed and grammar.words is not None and _repeats(ids[1:], grammar.separator):
                allowed = {grammar.end}
            if allowed and not grammar.is_free(states):
                blocked[number] = True
                blocked[number, list(allowed)] = False
        return scores.masked_fill(blocked, float("-inf"))

    def _follow(self, row: int, grammar: Grammar, ids: tuple[int, ...]) -> frozenset[State]:
        known = self._states[row]
        if not ids:
            return grammar.start
        if ids not in known:
            known[ids] = grammar.advance(self._follow(row, grammar, ids[:-1]), ids[-1])
        return known[ids]


def _repeats(ids: Sequence[int], separator: tuple[int, ...]) -> bool:
    """Whether the last reason of a text is the same as an earlier one."""
    reasons: list[list[int]] = []
    start, place = 0, 0
    while place <= len(ids) - len(separator):
        if tuple(ids[place : place + len(separator)]) == separator:
            reasons.append(list(ids[start:place]))
            place = start = place + len(separator)
        else:
            place += 1
    # what stands before the first separator is the label
    return list(ids[start:]) in reasons[1:]


@torch.no_grad()
def label_probabilities(
    model: nn.Module, tokenizer: Any, rows: Sequence[Example], *, batch_size: int, max_input_tokens: int
) -> list[dict[str, float]]:
    """The probability of every label of each example.

    A label's score is the log-probability of its pieces and of what has to follow them: the end, or the separator where
    a reason is asked for. The softmax runs over the labels of the example.

    Args:
        model: An encoder–decoder.
        tokenizer: Its tokenizer.
        rows: Examples with `choices` in their metadata.
        batch_size: Inputs encoded at once.
        max_input_tokens: Longer inputs are cut.
    """
    found: list[dict[str, float]] = []
    for start in range(0, len(rows), batch_size):
        found += _probabilities(model, tokenizer, rows[start : start + batch_size], max_input_tokens)
    return found


def _probabilities(model: nn.Module, tokenizer: Any, rows: Sequence[Example], longest: int) -> list[dict[str, float]]:
    inner: Any = pretrained(model)
    encoded = tokenizer([row.input for row in rows], truncation=True, max_length=longest)["input_ids"]
    batch = PadBatch(padding_id(tokenizer))([{"input_ids": ids} for ids in encoded])
    ids, mask = batch["input_ids"].to(inner.device), batch["attention_mask"].to(inner.device)
    targets, counts = [], []
    separator = pieces(tokenizer, SEPARATOR.strip())
    for row in rows:
        behind = separator if row.metadata["explain"] else (int(tokenizer.eos_token_id),)
        labels = row.metadata["choices"]
        targets += [torch.tensor(pieces(tokenizer, label, first=True) + behind) for label in labels]
        counts.append(len(labels))
    repeats = torch.tensor(counts, device=inner.device)
    padded = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED_LABEL).to(inner.device)
    hidden = inner.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    outputs = model(
        encoder_outputs=(hidden.repeat_interleave(repeats, dim=0),),
        attention_mask=mask.repeat_interleave(repeats, dim=0),
        labels=padded,
    )
    each = outputs.logits.float().log_softmax(-1).gather(-1, padded.clamp_min(0)[..., None])[..., 0]
    scores = each.masked_fill(padded == IGNORED_LABEL, 0.0).sum(-1).split(counts)
    return [
        dict(zip(row.metadata["choices"], own.softmax(0).tolist(), strict=True))
        for row, own in zip(rows, scores, strict=True)
    ]
