"""Encoding of users' texts in which control tokens are ordinary text."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}((?:[0-9a-fA-F]{{2}})+){_CLOSE}")
_MARKER = re.compile(r"<+[^<>\s]{1,80}>+|\[[^\[\]\s]{1,80}\]")
"""Markers in the literal text of a chat template, such as <|im_start|> and [INST]."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, automatic: bool = False) -> list[int]:
    """Return the token ids of a text; with `automatic`, those of the tokenizer's automatic special tokens too."""
    encoded: Any = tokenizer(text, add_special_tokens=automatic, verbose=False)
    return [int(number) for number in encoded["input_ids"]]


def decoded_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, keep_special: bool = False) -> str:
    """Return the text of token ids, without special tokens unless `keep_special` is set."""
    untyped: Any = tokenizer
    return str(untyped.decode(list(tokens), skip_special_tokens=not keep_special))


@dataclass(frozen=True, slots=True, eq=False)
class ControlTokens:
    """Tokens of a tokenizer that structure a prompt, and must not result from a user's text.

    Special tokens, the other entries of `added_tokens_decoder`, such as Qwen's <think>, and the markers in the chat
    template. Added entries that are not special and consist of white space or of letters and digits only, such as
    Gemma's runs of line feeds, are ordinary vocabulary.
    """

    special: Mapping[str, int]
    """Special tokens: name to id."""
    other: Mapping[str, int]
    """Added tokens and one-token markers of the template that are not special: name to id."""
    markers: frozenset[str]
    """Markers of the template that take several tokens, such as Llama 2's [INST]."""
    normalized: re.Pattern[str] | None
    """Normalised names of those tokens that the tokenizer finds in the normalised text only."""

    @property
    def ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset([*self.special.values(), *self.other.values()])


@dataclass(frozen=True, slots=True, eq=False)
class _Names:
    """Names to find in texts, derived once from the control tokens of a tokenizer."""

    control: ControlTokens
    ids: frozenset[int]
    every: re.Pattern[str]
    special: re.Pattern[str]
    prefixes: frozenset[str]
    longest: int


_CACHE: WeakKeyDictionary[Any, tuple[object, _Names]] = WeakKeyDictionary()
_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def tokenizer_lock(tokenizer: PreTrainedTokenizerBase) -> threading.RLock:
    """Return the lock of a tokenizer, for use by several threads.

    Encoding a control token as text changes a setting of the tokenizer for the duration of the call.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(tokenizer, threading.RLock())


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return the control tokens of a tokenizer."""
    untyped: Any = tokenizer
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    special = {str(token): int(index) for index, token in added.items() if token.special}
    # a name among all_special_tokens may be part of the vocabulary instead of an added token
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    special |= {str(name): int(index) for name, index in named}
    other = {
        str(token): int(index)
        for index, token in added.items()
        if str(token) not in special and not _is_ordinary(str(token))
    }
    markers: set[str] = set()
    for marker in set(_template_markers(tokenizer)) - special.keys() - other.keys():
        index: Any = untyped.convert_tokens_to_ids(marker)
        if index is not None and untyped.convert_ids_to_tokens(index) == marker:
            other[marker] = int(index)
        else:
            markers.add(marker)
    return ControlTokens(special, other, frozenset(markers), _normalized_names(tokenizer, added))


class SpecialTokenEscaper:
    """Replaces control tokens in users' texts by placeholders, and encodes placeholders as ordinary text.

    Templates are rendered between the two steps, so that control tokens of a template keep their meaning. A text
    without control tokens is encoded in one call, exactly as without escaping.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._names = _names_of(tokenizer)
        self.special_ids = frozenset(self._names.control.special.values())
        """Ids of the special tokens."""
        self.control_ids = self._names.ids
        """Ids of all control tokens."""
        self.specials = sorted(self._names.control.special, key=lambda name: (-len(name), name))

    def escape(self, text: str, *, keep_markup: bool = False) -> str:
        """Return a text with placeholders in place of control tokens.

        Args:
            text: The text.
            keep_markup: Replace special tokens only; for texts of a model, which contain markup such as <think>.
        """
        pattern = self._names.special if keep_markup else self._names.every
        if keep_markup:
            return pattern.sub(lambda found: _placeholder(found[0]), text)
        parts: list[str] = []
        end = 0
        for found in pattern.finditer(text):
            parts += [self._plain(text[end : found.start()]), _placeholder(found[0])]
            end = found.end()
        rest = text[end:]
        cut = self._open_end(rest)
        tail = len(rest.rstrip())
        closing = _placeholder(rest[cut:tail]) + rest[tail:] if cut < tail else rest[cut:]
        return "".join([*parts, self._plain(rest[:cut]), closing])

    def tokens(self, text: str, *, automatic: bool) -> list[int]:
        """Token ids of a rendered text; a text without placeholders is encoded in one call."""
        parts = _PLACEHOLDER.split(text)
        if len(parts) == 1:
            return token_ids(self.tokenizer, text, automatic=automatic)
        ids = token_ids(self.tokenizer, parts[0]) if parts[0] else []
        before, after = self._automatic(parts[0], ids) if automatic else ([], [])
        for digits, following in zip(parts[1::2], parts[2::2], strict=True):
            ids += self._as_text(_literal(digits))
            if following:
                ids += token_ids(self.tokenizer, following)
        return [*before, *ids, *after]

    def _plain(self, text: str) -> str:
        """A text without names of control tokens, with placeholders for spellings that are normalised to one."""
        names = self._names.control.normalized
        if names is None or not text or names.search(_backend(self.tokenizer).normalizer.normalize_str(text)) is None:
            return text
        untyped: Any = self.tokenizer
        encoded = untyped(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        parts: list[str] = []
        end = 0
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in self._names.ids and stop > start >= end:
                parts += [text[end:start], _placeholder(text[start:stop])]
                end = stop
        return "".join([*parts, text[end:]])

    def _open_end(self, text: str) -> int:
        """Position of the beginning of a control token at the end of a text, which a following text might complete."""
        stripped = text.rstrip()
        for length in range(min(self._names.longest, len(stripped)), 0, -1):
            if stripped[-length:] in self._names.prefixes:
                return len(stripped) - length
        return len(text)

    def _automatic(self, text: str, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer adds before and after a text."""
        whole = token_ids(self.tokenizer, text, automatic=True)
        start = next((at for at in range(len(whole) + 1) if whole[at : at + len(ids)] == list(ids)), 0)
        if not ids:
            # no text separates the tokens before from those after it; an end-of-sequence token is one of the latter
            end: Any = self.tokenizer.eos_token_id
            sep: Any = self.tokenizer.sep_token_id
            start = next((at for at, token in enumerate(whole) if token in (end, sep)), len(whole))
        return whole[:start], whole[start + len(ids) :]

    def _as_text(self, literal: str) -> list[int]:
        """Token ids of a placeholder's text, none of which is a control token."""
        forbidden = self._names.ids
        whole = token_ids(self.tokenizer, literal) if literal in self._names.control.markers else None
        ids: list[int] = []
        # only special tokens are split by split_special_tokens, and some vocabularies contain them as ordinary tokens
        for pieces in ([literal], [literal[:1], literal[1:]], list(literal)):
            given = [piece for piece in pieces if piece]
            encoded: Any = self.tokenizer(given, add_special_tokens=False, split_special_tokens=True)
            ids = [int(number) for piece in encoded["input_ids"] for number in piece]
            if not forbidden & set(ids) and ids != whole:
                break
        return [number for number in ids if number not in forbidden]


def _names_of(tokenizer: PreTrainedTokenizerBase) -> _Names:
    """The names of a tokenizer's control tokens; cached, because some tokenizers have thousands."""
    template: Any = getattr(tokenizer, "chat_template", None)
    state = (len(cast("Any", tokenizer)), str(template), tuple(map(str, tokenizer.all_special_tokens)))
    cached = _CACHE.get(tokenizer)
    if cached is None or cached[0] != state:
        cached = _CACHE[tokenizer] = (state, _derive_names(tokenizer))
    return cached[1]


def _derive_names(tokenizer: PreTrainedTokenizerBase) -> _Names:
    control = control_tokens(tokenizer)
    every = {*control.special, *control.other, *control.markers}
    prefixes = {name[:length] for name in every for length in range(1, len(name))}
    kept = frozenset(prefix for prefix in prefixes if not prefix.isalnum())
    return _Names(
        control,
        control.ids,
        # placeholder characters in a user's text are ordinary text too
        _any_of([*every, _OPEN, _CLOSE]),
        _any_of([*control.special, _OPEN, _CLOSE]),
        kept,
        max((len(prefix) for prefix in kept), default=0),
    )


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Pattern of any of several names; the longest name is found first."""
    return re.compile("|".join(map(re.escape, sorted(names, key=lambda name: (-len(name), name)))))


def _is_ordinary(name: str) -> bool:
    """True for a name of white space only, or of letters and digits only."""
    return not name.strip() or "".join(name.split()).isalnum()


def _template_markers(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Markers in the literal text of the chat templates."""
    found: Any = getattr(tokenizer, "chat_template", None)
    if not found:
        return
    from jinja2 import Environment, TemplateSyntaxError

    templates = cast("dict[str, str]", found).values() if isinstance(found, dict) else [found]
    for source in templates:
        try:
            for _, kind, text in Environment().lex(str(source)):
                if kind in ("data", "string"):
                    yield from _MARKER.findall(text)
        except TemplateSyntaxError:
            # rendering the template reports the error
            continue


def _normalized_names(tokenizer: PreTrainedTokenizerBase, added: Mapping[int, Any]) -> re.Pattern[str] | None:
    """Pattern of the normalised names of added tokens that are matched in normalised text."""
    normalizer: Any = getattr(_backend(tokenizer), "normalizer", None)
    names = [str(token) for token in added.values() if token.normalized and not _is_ordinary(str(token))]
    if normalizer is None or not names:
        return None
    return _any_of(sorted({normalizer.normalize_str(name) for name in names}))


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(tokenizer, "backend_tokenizer", None)


def _placeholder(literal: str) -> str:
    # the text itself, not a number: placeholders do not depend on the object that made them
    return f"{_OPEN}{literal.encode('utf-8', 'replace').hex()}{_CLOSE}"


def _literal(digits: str) -> str:
    return bytes.fromhex(digits).decode("utf-8", "replace")
