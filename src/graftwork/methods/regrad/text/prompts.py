"""Prompts of questions, cut to what a model can read, and answers out of generated tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftwork.errors import DataError
from graftwork.methods.regrad.text.prompting import family_for, question_ids
from graftwork.methods.regrad.text.requests import Question
from graftwork.retrieval.retriever import Hit

if TYPE_CHECKING:
    from graftwork.methods.regrad.config import ReGradConfig


class Prompts:
    """Makes prompts; threads may share one.

    Args:
        tokenizer: The model's tokenizer.
        config: The settings that the model was converted with.
        context_tokens: Longest that passages in a prompt may be together.
        positions: Longest that the model can read; None for no limit.
    """

    def __init__(self, tokenizer: Any, config: ReGradConfig, context_tokens: int, positions: int | None) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.context_tokens, self.positions = context_tokens, positions
        # spelling a control token out switches a setting of the tokenizer for a moment
        self._lock = threading.Lock()

    def __call__(self, question: Question, hits: Sequence[Hit], max_new_tokens: int) -> list[int]:
        """The prompt of a question, with its passages if it shows them.

        Raises:
            DataError: If the question alone is longer than the model can read.
        """
        with self._lock:
            blind = self._ids(question, ())
            room = self.context_tokens
            if self.positions is not None:
                room = min(room, self.positions - len(blind) - max_new_tokens)
                if room < 0:
                    raise DataError(
                        f"Found a question of {len(blind)} tokens; expected at most "
                        f"{self.positions - max_new_tokens}, so that {max_new_tokens} more fit into the "
                        f"{self.positions} that the model can read. Shorten it."
                    )
            return self._with_context(question, hits, blind, room) if question.context and hits else blind

    def read(self, tokens: Sequence[int]) -> str:
        """The answer in generated tokens: their first line."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).lstrip(" ").partition("\n")[0].strip()

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the end of a turn, and every one with a line feed in it."""
        pieces = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        own = {self.tokenizer.eos_token_id} - {None}
        return frozenset(own | {token for token, piece in enumerate(pieces) if "\n" in piece})

    @cached_property
    def silent(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        return frozenset(set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id})

    def _with_context(self, question: Question, hits: Sequence[Hit], blind: Sequence[int], room: int) -> list[int]:
        """The prompt with as much of the passages as there is room for, the first ones first."""
        shown = [(hit.title, hit.text) for hit in hits]
        whole = self._ids(question, shown)
        while shown and len(whole) - len(blind) > room:
            title, text = shown.pop()
            excess = len(whole) - len(blind) - room
            tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(tokens) > excess:
                shown.append((title, self.tokenizer.decode(tokens[: len(tokens) - excess])))
            whole = self._ids(question, shown) if shown else list(blind)
        return whole

    def _ids(self, question: Question, passages: Sequence[tuple[str, str]]) -> list[int]:
        family = family_for(self.config, question.kind)
        return question_ids(self.tokenizer, family, question.text, choices=question.choices, passages=passages)
