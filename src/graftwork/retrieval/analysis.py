"""Text analysis equal to Elasticsearch's `english` analyser."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from graftwork.errors import MissingExtraError

ANALYSER = "english/lucene-porter-1"
"""Version of the analysis in commit records and fingerprints; changes whenever any text yields different terms."""

_STOPPED = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOP_WORDS = frozenset(_STOPPED.split())
"""Lucene's English stop words."""

MAX_TOKEN_LENGTH = 255
"""Maximum token length of Lucene's tokenizer; longer tokens are split."""
_CACHED_WORDS = 1 << 20
_NARROW_NO_BREAK_SPACE = "\u202f"
# fast path for most pieces: ASCII letters, with punctuation around them that no word-boundary rule joins
_PLAIN_WORD = re.compile(r"[!-/:-@\[-^`{-~]*([A-Za-z]+)[!-/:-@\[-^`{-~]*").fullmatch


class _TermCache(dict[str, str]):
    """Cache of analysed terms: piece of text → its terms, separated by spaces."""

    def __init__(self, analyse: Callable[[str], list[str]]) -> None:
        super().__init__()
        self._analyse = analyse

    def __missing__(self, piece: str) -> str:
        self[piece] = found = " ".join(self._analyse(piece))
        return found


class EnglishAnalyser:
    """Analyser that splits a text into the stemmed terms of Elasticsearch's `english` analyser.

    Steps: word segmentation (UAX #29), removal of a possessive 's, lower case, removal of stop words, Porter stemmer
    (1980, with its author's later extensions). tantivy's own filters cannot reproduce this: its stemmer is Porter2, and
    its tokenizers split `U.S.A.`, `3.14` and `don't`.

    Source: Lucene's `EnglishAnalyzer` and `StandardTokenizer`; Unicode Standard Annex 29.

    Raises:
        MissingExtraError: If regex, nltk or PyStemmer is not installed.

    Example:
        >>> EnglishAnalyser().terms("The runners' running cities")
        ['runner', 'run', 'citi']
    """

    def __init__(self) -> None:
        self._find_words = _word_finder()
        self._stem = _stemmer()
        # keyed by whitespace-separated pieces: no word crosses white space, and pieces repeat often
        self._known = _TermCache(self._analyse)

    def terms(self, text: str) -> list[str]:
        """Terms of a text, in order, with repetitions."""
        return [term for piece in self._pieces(text) for term in piece.split(" ") if term]

    def joined(self, text: str) -> str:
        """Terms of a text, separated by single spaces."""
        return " ".join(filter(None, self._pieces(text)))

    def spaced(self, text: str) -> str:
        """Terms of a text, separated by one or more spaces; faster than `joined`."""
        return " ".join(self._pieces(text))

    def spaced_all(self, texts: Sequence[str]) -> list[str]:
        """`spaced` of many texts; Python analyses each distinct piece once, and Arrow does the rest without the GIL."""
        import pyarrow  # pyright: ignore[reportMissingTypeStubs]
        from pyarrow import compute as arrow_compute  # pyright: ignore[reportMissingTypeStubs]

        pa: Any = pyarrow
        compute: Any = arrow_compute
        # Arrow also splits at the narrow no-break space, which UAX #29 does not
        odd = [at for at, text in enumerate(texts) if _NARROW_NO_BREAK_SPACE in text]
        pieces = compute.utf8_split_whitespace(pa.array(texts, pa.string()))
        words = pieces.flatten().dictionary_encode()
        terms = pa.array(self._known_terms(words.dictionary.to_pylist()), pa.string())
        found = pa.ListArray.from_arrays(pieces.offsets, terms.take(words.indices))
        joined = compute.binary_join(found, " ").to_pylist()
        for at in odd:
            joined[at] = self.spaced(texts[at])
        return joined

    def _pieces(self, text: str) -> list[str]:
        """Terms of each whitespace-separated piece; empty for stop words."""
        return self._known_terms(text.split() if _NARROW_NO_BREAK_SPACE not in text else _split_spaces(text))

    def _known_terms(self, pieces: list[str]) -> list[str]:
        if len(self._known) > _CACHED_WORDS:
            self._known.clear()
        return list(map(self._known.__getitem__, pieces))

    def _analyse(self, piece: str) -> list[str]:
        plain = _PLAIN_WORD(piece)
        terms: list[str] = []
        for word in [plain[1]] if plain else self._find_words(piece):
            for start in range(0, len(word), MAX_TOKEN_LENGTH):
                token = word[start : start + MAX_TOKEN_LENGTH]
                if len(token) >= 2 and token[-2] in "'’＇" and token[-1] in "sS":
                    token = token[:-2]
                token = _lower(token)
                if token and token not in STOP_WORDS:
                    terms.append(self._stem(token))
        return terms


def _lower(token: str) -> str:
    """Lower-case each character separately, as Java does: no final sigma, no character that becomes two."""
    return token.lower() if token.isascii() else "".join("i" if c == "İ" else c.lower() for c in token)


def _split_spaces(text: str) -> list[str]:
    """Split at white space except at the narrow no-break space, which joins words in UAX #29."""
    return [
        piece.replace("\0", _NARROW_NO_BREAK_SPACE)
        for piece in text.replace("\0", " ").replace(_NARROW_NO_BREAK_SPACE, "\0").split()
    ]


@cache
def _word_finder() -> Callable[[str], list[str]]:
    try:
        import regex
    except ImportError:
        raise MissingExtraError("regex", "regrad") from None
    tail = r"[\p{WB=Format}\p{WB=Extend}\p{WB=ZWJ}]*"

    def any_of(letters: str) -> str:
        return f"(?:[{letters}]{tail})"

    hebrew = r"\p{WB=Hebrew_Letter}"
    letter = any_of(r"\p{WB=ALetter}" + hebrew)
    number = any_of(r"\p{WB=Numeric}\uFF10-\uFF19")
    katakana = any_of(r"\p{WB=Katakana}")
    joiner = any_of(r"\p{WB=ExtendNumLet}")
    in_word = any_of(r"\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}")
    in_number = any_of(r"\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}")
    after_hebrew = f"(?<={hebrew}{tail})"
    in_hebrew = after_hebrew + any_of(r"\p{WB=Double_Quote}") + f"(?={hebrew})"
    at_end = "(?:" + after_hebrew + any_of(r"\p{WB=Single_Quote}") + ")?"
    run = (
        f"(?:{katakana}(?:{joiner}*{katakana})*"
        f"|(?:{number}(?:(?:{joiner}*|{in_number}){number})*"
        f"|{letter}(?:(?:{joiner}*|{in_word}|{in_hebrew}){letter})*{at_end})+)"
    )
    ideograph = any_of(r"\p{Script=Han}\p{Script=Hiragana}")
    south_east = any_of(r"\p{LB=Complex_Context}") + "+"
    picture = r"\p{Extended_Pictographic}[\p{Emoji_Modifier}\uFE0F]?[\U000E0020-\U000E007F]*"
    emoji = rf"\p{{RI}}\p{{RI}}|[0-9#*]\uFE0F?\u20E3|{picture}(?:\u200D{picture})*{tail}"
    words = f"{joiner}*{run}(?:{joiner}+{run})*{joiner}*"
    pattern = regex.compile(f"{emoji}|{words}|{ideograph}|{south_east}")
    find: Callable[[str], list[str]] = pattern.findall
    return find


@cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("nltk", "regrad") from None
    try:
        import Stemmer as snowball  # noqa: N813
    except ImportError:
        raise MissingExtraError("PyStemmer", "regrad") from None
    exact: Any = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)
    # twenty times faster, and equal to the exact stemmer on the words that `stem` passes to it
    library: Any = snowball
    quick = library.Stemmer("porter", 0)
    plain = re.compile("[a-z]{3,}").fullmatch
    # Snowball's Porter lacks the extensions, and reduces only the double consonants listed by its author
    differs = re.compile(r"bl[iy]|log[iy]|([^aeioubdfgmnprtsl])\1").search

    def stem(word: str) -> str:
        return quick.stemWord(word) if plain(word) and not differs(word) else exact.stem(word, to_lowercase=False)

    return stem
