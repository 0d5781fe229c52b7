"""Splitting of documents into passages of a limited number of tokens, with overlap."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.files import replace_file
from graftwork.core.native import first_line
from graftwork.core.storage import writing
from graftwork.errors import ConfigError
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.retrieval.retriever import PASSAGE_MARK, Passage

TOKENS, OVERLAP = 200, 40
"""Default number of tokens of a passage, and of those that it shares with the one before."""
_ENDS = ".!?\n"
"""Last characters of a sentence or a line, where a passage should end."""


@dataclass(frozen=True)
class DocumentSplitter:
    """Splits documents into passages that end with a sentence, if one ends in the second half of the limit.

    Passage n of document `ID` has the id `ID:passageN` and the document's title; a document within the limit stays one
    passage with its own id.

    Args:
        tokenizer: Fast tokenizer, of the model that the passages are for.
        tokens: Maximum number of tokens of a passage, without special tokens.
        overlap: Number of tokens that a passage repeats of the one before.

    Raises:
        ConfigError: If the overlap is not smaller than half of the limit.
    """

    tokenizer: Any
    tokens: int = TOKENS
    overlap: int = OVERLAP

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if self.tokens < 2 or not 0 <= self.overlap < self.tokens / 2:
            raise ConfigError(
                f"Found passages of {self.tokens} tokens with an overlap of {self.overlap}; expected at least 2, and "
                "an overlap below half of it, so that every passage is mostly new text."
            )

    def split(self, document: Passage) -> Iterator[Passage]:
        """Yield the passages of a document, in order."""
        if self._count(document.text) <= self.tokens:
            yield document
            return
        offsets = self._offsets(document.text)
        start = number = 0
        while True:
            end = self._end(document.text, offsets, start)
            text = document.text[offsets[start][0] : offsets[end - 1][1]].strip()
            if text:
                yield Passage(f"{document.id}{PASSAGE_MARK}{number}", text, document.title)
                number += 1
            if end == len(offsets):
                return
            start = max(start + 1, self._start(document.text, offsets, end))

    def _start(self, text: str, offsets: list[tuple[int, int]], end: int) -> int:
        """First token of the passage after `end`: the beginning of a word within the overlap, if there is one."""
        overlapping = range(max(0, end - self.overlap), end)
        return next((at for at in overlapping if _begins_word(text, offsets[at][0])), end - self.overlap)

    def _end(self, text: str, offsets: list[tuple[int, int]], start: int) -> int:
        """Token before which a passage ends."""
        end = min(start + self.tokens, len(offsets))
        # a part of a text may have more tokens than it has within the whole
        while end > start + 1 and self._count(text[offsets[start][0] : offsets[end - 1][1]].strip()) > self.tokens:
            end -= 1
        if end == len(offsets):
            return end
        sentences = range(end, start + self.tokens // 2, -1)
        return next((at for at in sentences if text[: offsets[at - 1][1]].rstrip(" ")[-1:] in _ENDS), end)

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Beginning and end of every token in the text."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(int(start), int(stop)) for start, stop in encoded["offset_mapping"] if stop > start]


def _begins_word(text: str, at: int) -> bool:
    return at == 0 or text[at].isspace() or text[at - 1].isspace()


def split_corpus(corpus: str, output: Path, tokenizer: str, tokens: int, overlap: int) -> tuple[int, int]:
    """Write the passages of a corpus of documents as JSON lines.

    Args:
        corpus: A `.tsv` or `.jsonl` file, a folder of them, or a glob pattern.
        output: File to write; replaced when it is complete.
        tokenizer: Folder or hub id of the tokenizer.
        tokens: Maximum number of tokens of a passage.
        overlap: Number of tokens that a passage repeats of the one before.

    Returns:
        Number of documents and of passages.

    Raises:
        ConfigError: If the tokenizer cannot be loaded or has no offsets, or the numbers do not fit.
    """
    from transformers import AutoTokenizer

    auto_tokenizer: Any = AutoTokenizer
    try:
        loaded = auto_tokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The tokenizer {tokenizer} cannot be loaded: {first_line(error)}. Name a model.") from None
    if not loaded.is_fast:
        raise ConfigError(f"The tokenizer {tokenizer} gives no positions in the text; expected a fast tokenizer.")
    splitter, reader = DocumentSplitter(loaded, tokens, overlap), CorpusReader(find_corpus(corpus))
    count = 0
    with writing(output), replace_file(output) as file:
        for one in _passages(splitter, reader):
            file.write(json.dumps({"_id": one.id, "title": one.title, "text": one.text}, ensure_ascii=False) + "\n")
            count += 1
    return reader.count, count


def _passages(splitter: DocumentSplitter, documents: Iterable[Passage]) -> Iterator[Passage]:
    for document in documents:
        yield from splitter.split(document)
