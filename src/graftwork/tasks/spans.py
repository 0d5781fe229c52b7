"""Spans of a text as character offsets: words, tokens of a purpose, and the search of a quoted text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from graftwork.metrics.spans import Span

WORDS = re.compile(r"\w+|[^\w\s]+")
"""Words of untokenised text: runs of letters and digits, and runs of other characters that are not white space."""


def collapsed(text: str) -> str:
    """Text with single spaces between its white-space words."""
    return " ".join(text.split())


def word_places(text: str) -> list[Span]:
    """Character range of each word of untokenised text; see `WORDS`.

    Example:
        >>> word_places("A lazy sequel.")
        [(0, 1), (2, 6), (7, 13), (13, 14)]
    """
    return [found.span() for found in WORDS.finditer(text)]


def token_spans(spans: Sequence[Span], places: Sequence[Span]) -> list[Span]:
    """Token range of each character span, from the first to the last token that overlaps it.

    Args:
        spans: Character offsets [start, end).
        places: Character range of each token, in order.

    Returns:
        Half-open ranges of token positions; a span without a token is left out.

    Example:
        >>> token_spans([(2, 13)], [(0, 1), (2, 6), (7, 13), (13, 14)])
        [(1, 3)]
    """
    found: list[Span] = []
    for start, end in spans:
        inside = [index for index, (first, last) in enumerate(places) if first < end and start < last]
        if inside:
            found.append((inside[0], inside[-1] + 1))
    return found


def token_array(spans: Sequence[Span], places: Sequence[Span]) -> list[int]:
    """1 for each token that overlaps a character span, else 0."""
    array = [0] * len(places)
    for start, end in token_spans(spans, places):
        array[start:end] = [1] * (end - start)
    return array


def find_text(source: str, quoted: str, taken: Sequence[Span] = ()) -> tuple[Span | None, bool]:
    """Find a quoted text in its source: literally, else by its letters and digits alone.

    White space may differ. A match begins and ends at word boundaries, unless the script has none between words. The
    comparison of letters and digits (after NFKC normalisation and case folding) finds quotes of tokenizers that
    normalise text or lack characters.

    Args:
        source: Text that was quoted from.
        quoted: The quoted text.
        taken: Character spans that are in use; a match inside one of them is skipped.

    Returns:
        The first match outside `taken` as character offsets, or None; and True if there is a match anywhere.
    """
    for search in (_literal, _loose, _unbounded):
        matches = list(search(source, quoted))
        if matches:
            free = (one for one in matches if not any(start <= one[0] and one[1] <= end for start, end in taken))
            return next(free, None), True
    return None, False


def _literal(source: str, quoted: str) -> Iterator[Span]:
    words = quoted.split()
    if not words:
        return
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    pattern = before + r"\s+".join(map(re.escape, words)) + after
    # a lookahead finds overlapping matches too
    for found in re.finditer(f"(?=({pattern}))", source):
        yield found.span(1)


def _loose(source: str, quoted: str) -> Iterator[Span]:
    wanted = "".join(letter for letter, _ in _letters(quoted))
    letters = list(_letters(source))
    text = "".join(letter for letter, _ in letters)
    start = text.find(wanted) if wanted else -1
    while start >= 0:
        first, last = letters[start][1], letters[start + len(wanted) - 1][1]
        inside = (first > 0 and source[first - 1].isalnum()) or source[last + 1 : last + 2].isalnum()
        if not inside:
            yield first, last + 1
        start = text.find(wanted, start + 1)


def _unbounded(source: str, quoted: str) -> Iterator[Span]:
    text = quoted.strip()
    # scripts without spaces have no word boundaries
    if text and not text.isascii():
        yield from (found.span() for found in re.finditer(re.escape(text), source))


def _letters(text: str) -> Iterator[tuple[str, int]]:
    """Letters and digits of a text, normalised, each with its position."""
    for place, character in enumerate(text):
        for letter in unicodedata.normalize("NFKC", character).casefold():
            if letter.isalnum():
                yield letter, place
