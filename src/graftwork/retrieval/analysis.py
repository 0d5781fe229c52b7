"""The text analysis of Elasticsearch's `english`: which terms a text is found by."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from graftwork.errors import MissingExtraError

ANALYSER = "english/lucene-porter-1"
"""Name of the analysis in seals and fingerprints; another one whenever any text would give other terms."""

_STOPPED = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOP_WORDS = frozenset(_STOPPED.split())
"""Lucene's English stop words."""

MAX_TOKEN_LENGTH = 255
_CACHED_WORDS = 1 << 20
_NARROW_NO_BREAK_SPACE = "\u202f"
# most of what stands between white spaces: letters, with marks before and behind that no rule joins to them
_PLAIN_WORD = re.compile(r"[!-/:-@\[-^`{-~]*([A-Za-z]+)[!-/:-@\[-^`{-~]*").fullmatch


class _Known(dict[str, str]):
    """Terms by what they are the terms of, found out once."""

    def __init__(self, analyse: Callable[[str], list[str]]) -> None:
        super().__init__()
        self._analyse = analyse

    def __missing__(self, piece: str) -> str:
        self[piece] = found = " ".join(self._analyse(piece))
        return found


class EnglishAnalyser:
    """Cuts a text into stemmed terms as Elasticsearch's `english` analyser does.

    In this order: words by Unicode's rules for word boundaries, a final 's dropped, lower case, stop words dropped,
    Porter's stemmer of 1980 with its author's later rules. No chain that tantivy can build does this: its stemmer is
    Porter2, and its tokenizers part `U.S.A.`, `3.14` and `don't`.

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
        # what stands between two white spaces, with its terms: no word crosses white space, and texts repeat themselves
        self._known = _Known(self._analyse)

    def terms(self, text: str) -> list[str]:
        """The terms of a text, in order, repeated ones repeated."""
        return [term for piece in self._pieces(text) for term in piece.split(" ") if term]

    def joined(self, text: str) -> str:
        """The terms of a text with single blanks between them."""
        return " ".join(filter(None, self._pieces(text)))

    def spaced(self, text: str) -> str:
        """The terms of a text with blanks between them, of which there may be several; the quickest form."""
        return " ".join(self._pieces(text))

    def spaced_all(self, texts: Sequence[str]) -> list[str]:
        """`spaced` of many texts; Python sees every different word once, the rest is Arrow's, beside other threads."""
        import pyarrow as pa
        import pyarrow.compute as pc

        compute: Any = pc
        # Arrow would split at the narrow no-break space too
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
        """For each stretch without white space its terms, none for a stop word."""
        return self._known_terms(text.split() if _NARROW_NO_BREAK_SPACE not in text else _split_spaces(text))

    def _known_terms(self, pieces: list[str]) -> list[str]:
        if len(self._known) > _CACHED_WORDS:
            self._known.clear()
        return list(map(self._known.__getitem__, pieces))

    def _analyse(self, piece: str) -> list[str]:
        plain = _PLAIN_WORD(piece)
        terms = []
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
    """Lower case letter by letter, as Java does it: no final sigma, no letter that becomes two."""
    return token.lower() if token.isascii() else "".join("i" if c == "İ" else c.lower() for c in token)


def _split_spaces(text: str) -> list[str]:
    """Split at white space but not at the narrow no-break space, which joins words in Unicode's rules."""
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
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise MissingExtraError("nltk", "regrad") from None
    try:
        import Stemmer
    except ImportError:
        raise MissingExtraError("PyStemmer", "regrad") from None
    exact: Any = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)
    # twenty times as quick; of the words that it is asked for, it stems every one as the exact one does
    quick: Any = Stemmer.Stemmer("porter", 0)
    plain = re.compile("[a-z]{3,}").fullmatch
    # Snowball's Porter has none of the later rules, and halves only those double consonants that its author listed
    differs = re.compile(r"bl[iy]|log[iy]|([^aeioubdfgmnprtsl])\1").search

    def stem(word: str) -> str:
        return quick.stemWord(word) if plain(word) and not differs(word) else exact.stem(word, to_lowercase=False)

    return stem
