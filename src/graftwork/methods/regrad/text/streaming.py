"""Text of an answer in parts, while its tokens are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftwork.methods.regrad.text.prompting import PromptBuilder

_INCOMPLETE = "\ufffd"
"""Replacement character: the last token ends within a character."""


class TextStream:
    """Text of one answer as its tokens arrive; the parts add up to the final text.

    Text is held back as long as later tokens can change it: incomplete characters, white space at the end, which the
    answer is stripped of, and beginnings of stop sequences.

    Args:
        prompts: Decoder of the tokens.
        verbatim: True keeps line feeds and white space.
        stop: Sequences that end the text; they are no part of it.
    """

    def __init__(self, prompts: PromptBuilder, *, verbatim: bool = False, stop: Sequence[str] = ()) -> None:
        self._prompts, self._verbatim = prompts, verbatim
        self._stop = [sequence for sequence in stop if sequence]
        self.sent = ""
        """Text of all parts so far."""
        self.stopped = False
        """True once the text contains a stop sequence."""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Return the next part of the text, or an empty one.

        Args:
            tokens: All tokens of the answer so far, without special tokens.
            last: True if no further tokens follow.
        """
        if self.stopped:
            return ""
        text, self.stopped = self.final(tokens)
        if not (last or self.stopped):
            text = text[: self._certain(text)]
        # a decoder that changes earlier text, such as one that removes spaces before punctuation, waits for the end
        if not text.startswith(self.sent):
            return ""
        part = text[len(self.sent) :]
        self.sent = text
        return part

    def final(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text of all tokens up to the first stop sequence, and True if there is one."""
        text = self._prompts.decode(tokens, verbatim=self._verbatim)
        ends = [text.find(sequence) for sequence in self._stop if sequence in text]
        return (text[: min(ends)], True) if ends else (text, False)

    def _certain(self, text: str) -> int:
        """Number of characters that later tokens cannot change."""
        end = len(text.rstrip(_INCOMPLETE))
        if not self._verbatim:
            end = len(text[:end].rstrip())
        begun = (
            length
            for sequence in self._stop
            for length in range(min(len(sequence) - 1, end), 0, -1)
            if text.endswith(sequence[:length], 0, end)
        )
        return end - max(begun, default=0)
