"""Encoding of users' texts in which special tokens are ordinary text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, automatic: bool = False) -> list[int]:
    """Return the token ids of a text; with `automatic`, those of the tokenizer's automatic special tokens too."""
    encoded: Any = tokenizer(text, add_special_tokens=automatic, verbose=False)
    return [int(number) for number in encoded["input_ids"]]


def decoded_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, keep_special: bool = False) -> str:
    """Return the text of token ids, without special tokens unless `keep_special` is set."""
    untyped: Any = tokenizer
    return str(untyped.decode(list(tokens), skip_special_tokens=not keep_special))


class SpecialTokenEscaper:
    """Replaces special tokens in users' texts by placeholders, and encodes placeholders as ordinary text.

    Templates are rendered between the two steps, so that special tokens of a template keep their meaning.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # tokens such as Llama 3's <|start_header_id|> are special, but have no name among all_special_tokens
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        unnamed = {index: str(token) for index, token in added.items() if token.special}
        names = {str(name) for name in tokenizer.all_special_tokens} | set(unnamed.values())
        self.special_ids = frozenset(int(index) for index in (*tokenizer.all_special_ids, *unnamed))
        self.specials = sorted(names, key=lambda name: (-len(name), name))
        self.pattern = re.compile("|".join(map(re.escape, self.specials))) if self.specials else None

    def escape(self, text: str) -> str:
        """Return a text with placeholders in place of special tokens."""
        if self.pattern is None:
            return text
        return self.pattern.sub(lambda found: f"\ue000{self.specials.index(found[0])}\ue001", text)

    def tokens(self, text: str, *, automatic: bool) -> list[int]:
        """Token ids of a rendered text; a text without placeholders is encoded in one call."""
        parts = _PLACEHOLDER.split(text)
        ids = token_ids(self.tokenizer, parts[0], automatic=automatic)
        for number, following in zip(parts[1::2], parts[2::2], strict=True):
            # placeholder characters in the user's own text are ordinary text too
            known = int(number) < len(self.specials)
            ids += self._as_text(self.specials[int(number)] if known else f"\ue000{number}\ue001")
            if following:
                ids += token_ids(self.tokenizer, following)
        return ids

    def _as_text(self, special: str) -> list[int]:
        """Token ids of a special token's name, encoded as ordinary text."""
        forbidden = self.special_ids
        ids: list[int] = []
        # some vocabularies contain the name as one token even with split_special_tokens
        for pieces in ([special], list(special)):
            encoded: Any = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)
            ids = [int(number) for piece in encoded["input_ids"] for number in piece]
            if not forbidden & set(ids):
                break
        return [number for number in ids if number not in forbidden]
