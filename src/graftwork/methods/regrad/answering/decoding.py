"""Continuous batching: rows join and leave a running batch between any two tokens."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.evaluation.sampling import Sampling, TokenSampler
from graftwork.methods.regrad.answering.row_cache import is_joinable, join_caches, select_rows
from graftwork.methods.regrad.answering.row_updates import RowUpdates
from graftwork.methods.regrad.text.generation import default_processors, pad_left
from graftwork.methods.regrad.text.requests import TokenProbability
from graftwork.surgery.sites import pretrained

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.cancellation import IsCancelled
    from graftwork.methods.regrad.answering.in_place import InPlaceUpdater
    from graftwork.methods.regrad.text.requests import RetrievedUpdate

_BATCHES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(slots=True, eq=False)
class DecodingRow:
    """One answer in progress."""

    update: RetrievedUpdate
    """The question with its update; fixed while the answer is generated."""
    prompt: Sequence[int]
    """Token ids of the prompt."""
    max_new_tokens: int
    """Maximum number of new tokens."""
    ends: frozenset[int]
    """Stop tokens."""
    top: int | None = None
    """Number of most likely tokens to record with each token; None records no probabilities."""
    tokens: list[int] = field(default_factory=list[int])
    """Generated tokens, including the stop token."""
    probabilities: list[TokenProbability] = field(default_factory=list[TokenProbability])
    """Probabilities of the generated tokens, if requested."""
    began: float = field(default_factory=time.perf_counter)
    sampler: TokenSampler | None = None

    def __post_init__(self) -> None:
        """Create the sampler of the row."""
        sampling: Sampling | None = self.update.question.sampling
        self.sampler = None if sampling is None else TokenSampler([sampling])

    @property
    def finished(self) -> bool:
        """True once a stop token or the limit of new tokens has ended the answer."""
        return len(self.tokens) >= self.max_new_tokens or (bool(self.tokens) and self.tokens[-1] in self.ends)


@dataclass(slots=True, eq=False)
class _Group:
    """Rows that share forward passes: all of them, or single rows if their caches cannot be joined."""

    rows: list[DecodingRow]
    updates: RowUpdates
    cache: Any
    lengths: list[int]
    """Number of tokens of each row in the cache."""


class ContinuousDecoder:
    """Generates one token of every row at a time; rows join and leave between tokens. Used by one thread.

    Row r is computed with its own adapter θ + Δ_r, positions and mask, so that its tokens equal those of the row alone
    up to rounding. Models whose caches cannot be joined, such as those with recurrent states, and in-place updates,
    run row by row, one token each in turn.

    Args:
        model: The converted model.
        padding: Padding token.
        in_place: Writes updates into the adapter; None adds them in the forward pass.
    """

    def __init__(self, model: nn.Module, padding: int, in_place: InPlaceUpdater | None = None) -> None:
        self.model, self.padding, self.in_place = model, padding, in_place
        self._groups: list[_Group] = []
        self._processors = default_processors(model)

    @property
    def rows(self) -> list[DecodingRow]:
        """Rows in progress."""
        return [row for group in self._groups for row in group.rows]

    @torch.no_grad()
    def join(self, rows: Sequence[DecodingRow]) -> None:
        """Process the prompts of rows, generate the next token of each, and add the rows to the batch.

        Rows that have tokens already continue after them. If this raises, no row was added.
        """
        together = self.in_place is None and (len(rows) == 1 or batches_prompts(self.model, self.padding))
        added = [self._started(part) for part in ([list(rows)] if together else [[row] for row in rows])]
        for group in added:
            self._add(group)

    @torch.no_grad()
    def step(self) -> None:
        """Generate the next token of every row.

        If this raises, the batch is unusable until `clear`; tokens of rows that were generated before are kept.
        """
        for group in self._groups:
            device = self._device
            ids = torch.tensor([[row.tokens[-1]] for row in group.rows], device=device)  # [rows 1]
            lengths = torch.tensor(group.lengths, device=device)[:, None]  # [rows 1]
            width = max(group.lengths)
            mask = torch.arange(width + 1, device=device) >= width - lengths  # [rows positions]
            logits, group.cache = self._forward(group, ids, mask.long(), lengths, group.cache)
            group.lengths = [length + 1 for length in group.lengths]
            self._choose(group.rows, logits)

    def leave(self, rows: Sequence[DecodingRow]) -> None:
        """Remove rows from the batch."""
        gone = set(map(id, rows))
        kept: list[_Group] = []
        for group in self._groups:
            numbers = [number for number, row in enumerate(group.rows) if id(row) not in gone]
            if not numbers:
                continue
            if len(numbers) < len(group.rows):
                group.rows = [group.rows[number] for number in numbers]
                group.lengths = [group.lengths[number] for number in numbers]
                select_rows(group.cache, numbers, max(group.lengths))
                group.updates = self._updates(group.rows)
            kept.append(group)
        self._groups = kept

    def clear(self) -> None:
        """Remove all rows."""
        self._groups = []

    def _started(self, rows: list[DecodingRow]) -> _Group:
        """A batch of rows after their prompts, with one new token each."""
        sequences = [[*row.prompt, *row.tokens] for row in rows]
        ids, mask = pad_left(sequences, self.padding, self._device)  # [rows tokens]
        group = _Group(rows, self._updates(rows), None, [len(sequence) for sequence in sequences])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)  # [rows tokens]
        logits, group.cache = self._forward(group, ids, mask, positions, None)
        self._choose(rows, logits)
        return group

    def _add(self, group: _Group) -> None:
        first = self._groups[0] if self._groups else None
        if first is None or self.in_place is not None or not (is_joinable(first.cache) and is_joinable(group.cache)):
            self._groups.append(group)
            return
        join_caches([first.cache, group.cache])
        first.rows += group.rows
        first.lengths += group.lengths
        first.updates = self._updates(first.rows)

    def _forward(
        self, group: _Group, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Float[Tensor, "rows vocabulary"], Any]:
        """Logits of the next token of each row, and the cache after the pass."""
        inner: Any = pretrained(self.model)
        given: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in given.items() if name in self._parameters}
        with group.updates.applied():
            output = inner(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        return output.logits[:, -1], output.past_key_values

    def _choose(self, rows: Sequence[DecodingRow], logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Append the next token of each row."""
        likely = cast("list[int]", _plain(logits.argmax(-1)))
        for number, row in enumerate(rows):
            scores = logits[number : number + 1]  # [1 vocabulary]
            token = likely[number]
            if self._processors or row.sampler is not None:
                ids = torch.tensor([[*row.prompt, *row.tokens]], device=scores.device)
                processed = scores.float()
                for processor in self._processors:
                    processed = processor(ids, processed)
                if row.sampler is not None:
                    processed = row.sampler(ids, processed)
                token = int(processed.argmax())
            if row.top is not None:
                row.probabilities.append(_probability(scores[0], token, row.top))
            row.tokens.append(token)

    def _updates(self, rows: Sequence[DecodingRow]) -> RowUpdates:
        return RowUpdates(self.model, [row.update for row in rows], self.in_place)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(pretrained(self.model).forward).parameters)

    @cached_property
    def _device(self) -> torch.device:
        return pretrained(self.model).device


@torch.no_grad()
def batches_prompts(model: nn.Module, padding: int) -> bool:
    """True if prompts of unequal length may share a batch: recurrent states would read the padding.

    Args:
        model: The converted model; its cache is looked at once.
        padding: Padding token.
    """
    if model not in _BATCHES:
        inner: Any = pretrained(model)
        ids = torch.full((1, 2), padding, device=inner.device)
        _BATCHES[model] = is_joinable(inner(input_ids=ids, use_cache=True).past_key_values)
    return _BATCHES[model]


def decode(decoder: ContinuousDecoder, rows: Sequence[DecodingRow], cancelled: IsCancelled | None = None) -> set[int]:
    """Generate all tokens of rows together; a row leaves the batch with its last token.

    Args:
        decoder: A decoder without rows.
        rows: The rows, which receive their tokens.
        cancelled: Called with the number of a row before each of its tokens but the first.

    Returns:
        Numbers of the cancelled rows.
    """
    numbers = {id(row): number for number, row in enumerate(rows)}
    gone: set[int] = set()
    decoder.join(rows)
    while active := decoder.rows:
        if cancelled is not None:
            gone |= {numbers[id(row)] for row in active if cancelled(numbers[id(row)])}
        done = [row for row in active if row.finished or numbers[id(row)] in gone]
        if done:
            decoder.leave(done)
        if len(done) < len(active):
            decoder.step()
    return gone


def _probability(logits: Float[Tensor, " vocabulary"], token: int, count: int) -> TokenProbability:
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    top = zip(cast("list[int]", _plain(tokens)), cast("list[float]", _plain(values)), strict=True)
    return TokenProbability(token, float(logprobs[token]), tuple(top))


def _plain(tensor: Any) -> Any:
    """Numbers of a tensor, untyped because torch's annotation is incomplete."""
    return tensor.tolist()
