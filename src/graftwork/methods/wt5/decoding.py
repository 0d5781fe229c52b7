"""Label probabilities, and generation constrained to a label and spans of the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftwork.core.example import Example
from graftwork.methods.wt5.formats import SEPARATOR
from graftwork.surgery.sites import pretrained
from graftwork.tasks.eraser import document_tokens
from graftwork.training.encoding import IGNORED_LABEL, PadBatch, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABEL, _AFTER, _SEPARATOR, _COPY, _FREE, _END = range(6)
State = tuple[int, int, int]
"""State of the automaton: its kind, and two indices whose meaning depends on the kind."""


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool = False) -> tuple[int, ...]:
    """Token ids of a word or phrase at the start of a target (`first`) or after other words."""
    if first:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    # encoded after another word, because tokenizers attach the space to different sides
    before = tokenizer("x", add_special_tokens=False)["input_ids"]
    return tuple(tokenizer(f"x {text}", add_special_tokens=False)["input_ids"][len(before) :])


@dataclass(frozen=True)
class Grammar:
    """Nondeterministic automaton of the valid outputs of one example: a label, then explanations after separators.

    The current position is a set of states, because the next token can belong to several places of the source.
    """

    labels: tuple[tuple[int, ...], ...]
    """Token ids of each label."""
    separator: tuple[int, ...]
    """Token ids of the separator."""
    words: tuple[tuple[int, ...], ...] | None
    """Token ids of each word of the source, from which explanations are copied; None for free-text explanations."""
    end: int
    """Token id of the end of a text."""
    explain: bool = True
    """True if explanations are allowed."""

    @cached_property
    def start(self) -> frozenset[State]:
        """States before the first token."""
        return frozenset((_LABEL, label, 0) for label in range(len(self.labels)))

    @cached_property
    def _first_pieces(self) -> Mapping[int, frozenset[State]]:
        """States after the first token of any word: a span can start at each word."""
        found: dict[int, set[State]] = {}
        for word, own in enumerate(self.words or ()):
            if own:
                found.setdefault(own[0], set()).add((_COPY, word, 1))
        return {piece: frozenset(states) for piece, states in found.items()}

    def options(self, state: State) -> Iterable[tuple[int, Iterable[State]]]:
        """Transitions of a state as (next token, states after it)."""
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
        # words without a token, whose characters are all missing from the vocabulary, are skipped
        while word < len(words) and not words[word]:
            word += 1
        if word < len(words):
            yield words[word][0], [(_COPY, word, 1)]

    def is_free(self, states: frozenset[State]) -> bool:
        """True if any token is allowed: after a separator of free-text explanations."""
        return self.words is None and any(
            kind == _FREE or (kind == _SEPARATOR and one == len(self.separator)) for kind, one, _ in states
        )

    def allowed(self, states: frozenset[State], left: int | None = None) -> set[int]:
        """Allowed next tokens.

        Args:
            states: Current states.
            left: Remaining tokens, including the next one; tokens after which the text cannot end within the limit are
                excluded, unless that excludes all. None for no limit.
        """
        options = [option for state in states for option in self.options(state)]
        every = {piece for piece, _ in options}
        if left is None:
            return every
        in_time = {piece for piece, behind in options if any(self._to_end(after) < left for after in behind)}
        return in_time or every

    def _to_end(self, state: State) -> int:
        """Minimal number of tokens to the end of the text from a state, including the end token."""
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
        """States after one more token."""
        if self.is_free(states):
            return frozenset({(_FREE, 0, 0)})
        return frozenset(
            after for state in states for option, behind in self.options(state) if option == piece for after in behind
        )


def grammar_of(tokenizer: PreTrainedTokenizerBase, row: Example) -> Grammar | None:
    """Build the grammar of an example; None if its labels are unknown."""
    labels = row.metadata.get("choices")
    if not labels:
        return None
    source = row.metadata.get("source")
    words = None if source is None else tuple(pieces(tokenizer, word) for word in document_tokens(source))
    return Grammar(
        labels=tuple(pieces(tokenizer, label, first=True) for label in labels),
        separator=pieces(tokenizer, SEPARATOR.strip()),
        words=words,
        end=cast(int, tokenizer.eos_token_id),
        explain=bool(row.metadata.get("explain", True)),
    )


class GrammarProcessor:
    """Logits processor that masks the tokens forbidden by the grammar of each row.

    Every text ends within the token limit with a complete span. A text also ends at a repeated span, because small
    models loop once they repeat themselves.

    Args:
        grammars: One grammar per row of the batch; None leaves a row unconstrained.
        max_new_tokens: Maximal number of generated tokens; None for no limit.
    """

    def __init__(self, grammars: Sequence[Grammar | None], max_new_tokens: int | None = None) -> None:
        self.grammars = grammars
        self.max_new_tokens = max_new_tokens
        self._states: list[dict[tuple[int, ...], frozenset[State]]] = [{} for _ in grammars]

    def __call__(
        self, input_ids: Int[Tensor, "rows_beams tokens"], scores: Float[Tensor, "rows_beams vocabulary"]
    ) -> Float[Tensor, "rows_beams vocabulary"]:
        """Set the scores of forbidden tokens to −∞; beams of a row are consecutive."""
        beams = len(input_ids) // len(self.grammars)
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        rows = cast("list[list[int]]", input_ids.tolist())  # pyright: ignore[reportUnknownMemberType]
        for number, ids in enumerate(rows):
            grammar = self.grammars[number // beams]
            if grammar is None:
                continue
            # the first token is the decoder start token
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
    """True if the last explanation of a text equals an earlier one."""
    reasons: list[list[int]] = []
    start, place = 0, 0
    while place <= len(ids) - len(separator):
        if tuple(ids[place : place + len(separator)]) == separator:
            reasons.append(list(ids[start:place]))
            place = start = place + len(separator)
        else:
            place += 1
    # the first part is the label
    return list(ids[start:]) in reasons[1:]


@torch.no_grad()
def label_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    batch_size: int,
    max_input_tokens: int,
) -> list[dict[str, float]]:
    """Probability of every label of each example: softmax over the labels y of log p(y, e | x).

    e is the token after the label: the end of the text, or the separator if an explanation is requested.

    Args:
        model: Encoder-decoder model.
        tokenizer: Tokenizer of the model.
        rows: Examples with `choices` in their metadata.
        batch_size: Number of inputs per batch.
        max_input_tokens: Maximal number of input tokens; longer inputs are truncated.
    """
    found: list[dict[str, float]] = []
    for start in range(0, len(rows), batch_size):
        found += _probabilities(model, tokenizer, rows[start : start + batch_size], max_input_tokens)
    return found


def _probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], longest: int
) -> list[dict[str, float]]:
    """Label probabilities of one batch."""
    inner: Any = pretrained(model)
    encoded = tokenizer([row.input for row in rows], truncation=True, max_length=longest)["input_ids"]
    batch = PadBatch(padding_id(tokenizer))([{"input_ids": ids} for ids in encoded])
    ids, mask = batch["input_ids"].to(inner.device), batch["attention_mask"].to(inner.device)  # [rows tokens]
    targets: list[Tensor] = []
    counts: list[int] = []
    separator = pieces(tokenizer, SEPARATOR.strip())
    for row in rows:
        behind = separator if row.metadata["explain"] else (cast(int, tokenizer.eos_token_id),)
        labels = row.metadata["choices"]
        targets += [torch.tensor(pieces(tokenizer, label, first=True) + behind) for label in labels]
        counts.append(len(labels))
    repeats = torch.tensor(counts, device=inner.device)
    padded = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED_LABEL).to(inner.device)
    # padded [all_labels target_tokens], hidden [rows tokens width]
    hidden: Tensor = inner.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    outputs = model(
        encoder_outputs=(hidden.repeat_interleave(repeats, dim=0),),  # [all_labels tokens width]
        attention_mask=mask.repeat_interleave(repeats, dim=0),
        labels=padded,
    )
    logits: Tensor = outputs.logits  # [all_labels target_tokens vocabulary]
    each = logits.float().log_softmax(-1).gather(-1, padded.clamp_min(0)[..., None])[..., 0]
    scores = torch.split(each.masked_fill(padded == IGNORED_LABEL, 0.0).sum(-1), counts)  # [labels] per row
    return [
        dict(zip(row.metadata["choices"], map(float, own.softmax(0)), strict=True))
        for row, own in zip(rows, scores, strict=True)
    ]
