"""Encoding of texts without control tokens of their own, and character positions of their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from graftwork.core.example import Example
from graftwork.tasks.special_tokens import SpecialTokenEscaper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ESCAPE = "escape"
"""Metadata field of examples whose texts are data only, so that names of control tokens in them are ordinary text."""
PARTS = "target_parts"
"""Metadata field with the parts of the target: pairs of a text and the position in the input that it depends on."""


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    automatic: bool,
    escape: bool = True,
    as_targets: bool = False,
) -> list[list[int]]:
    """Token ids of texts in which names of control tokens, such as `</s>`, are ordinary text.

    Args:
        tokenizer: Tokenizer of the model.
        texts: The texts.
        automatic: Add the tokenizer's automatic special tokens.
        escape: False keeps control tokens in the texts.
        as_targets: Use the vocabulary of targets, where the tokenizer has one of its own.
    """
    if not texts:
        return []
    given: dict[str, Any] = {"text_target" if as_targets else "text": list(texts)}
    encoded: Any = tokenizer(**given, add_special_tokens=automatic, verbose=False)
    found = cast("list[list[int]]", encoded["input_ids"])
    if not escape:
        return found
    escaper = SpecialTokenEscaper(tokenizer)
    for index, text in enumerate(texts):
        escaped = escaper.escape(text)
        if escaped != text:
            found[index] = escaper.tokens(escaped, automatic=automatic)
    return found


def encode_inputs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], limit: int, *, automatic: bool
) -> list[list[int]]:
    """Token ids of the inputs of examples, cut at the end to `limit` tokens.

    Args:
        tokenizer: Tokenizer of the model.
        rows: The examples.
        limit: Maximum number of tokens.
        automatic: Add the tokenizer's automatic special tokens, which are kept in a cut input.
    """
    encoded: Any = tokenizer(
        [row.text for row in rows], truncation=True, max_length=limit, add_special_tokens=automatic, verbose=False
    )
    found = cast("list[list[int]]", encoded["input_ids"])
    chosen = [index for index, row in enumerate(rows) if row.metadata.get(ESCAPE)]
    escaper = SpecialTokenEscaper(tokenizer) if chosen else None
    for index in chosen:
        text = rows[index].text
        if escaper is not None and (escaped := escaper.escape(text)) != text:
            ids = escaper.tokens(escaped, automatic=automatic)
            last = ids[-1:] if automatic and ids[-1:] and ids[-1] in escaper.special_ids else []
            found[index] = ids if len(ids) <= limit else [*ids[: limit - len(last)], *last]
    return found


def visible_end(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, *, automatic: bool) -> int:
    """Number of characters of a text that its first `limit` tokens contain.

    Args:
        tokenizer: Tokenizer of the model.
        text: The text.
        limit: Maximum number of tokens.
        automatic: True if the tokenizer's automatic special tokens count.
    """
    untyped: Any = tokenizer
    added = len(untyped("", add_special_tokens=True)["input_ids"]) if automatic else 0
    kept = max(0, limit - added)
    if untyped.is_fast:
        encoded = untyped(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        return len(text) if len(offsets) <= kept else int(offsets[kept - 1][1]) if kept else 0

    def count(end: int) -> int:
        return len(untyped(text[:end], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])

    if count(len(text)) <= kept:
        return len(text)
    # tokenizers without offsets: the last end of a word whose text fits
    ends = [0, *(found.end() for found in re.finditer(r"\S+", text))]
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(ends[middle]) <= kept else (low, middle - 1)
    return ends[low]


def visible_target(tokenizer: PreTrainedTokenizerBase, row: Example, limit: int, *, automatic: bool) -> tuple[str, int]:
    """Target without the parts whose text is beyond the end of a cut input, and the number of such parts.

    Args:
        tokenizer: Tokenizer of the model.
        row: Example; without the metadata field `target_parts`, its target is returned unchanged.
        limit: Maximum number of input tokens.
        automatic: As in `encode_inputs`.
    """
    parts: Sequence[tuple[str, int]] | None = row.metadata.get(PARTS)
    if parts is None or all(end == 0 for _, end in parts):
        return row.target, 0
    seen = visible_end(tokenizer, row.text, limit, automatic=automatic)
    kept = [text for text, end in parts if end <= seen]
    return "".join(kept).lstrip(), len(parts) - len(kept)
