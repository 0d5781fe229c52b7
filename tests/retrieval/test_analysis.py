"""Terms that Elasticsearch's `english` gives; the expected ones are the specification's, and the Unicode annex's."""

import random
from itertools import product

import pytest
from nltk.stem.porter import PorterStemmer

from graftwork.retrieval.analysis import STOP_WORDS, EnglishAnalyser, _stemmer, _word_finder

_ENDINGS = (
    "ational tional enci anci izer bli alli entli ousli ization ation ator alism iveness fulness aliti biliti "
    "logi icate ative alize iciti ical ful ness ance er able ement ment ent sion tion ou iti ous ive ize sses "
    "ies s eed ed ing y e ll ly logy bly kked vving cced"
)


@pytest.fixture(scope="module")
def analyser() -> EnglishAnalyser:
    return EnglishAnalyser()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The runners' running cities", "runner run citi"),
        ("news dying generously skies university has", "new dy gener ski univers ha"),
        ("possibly apology", "possibl apolog"),
        ("U.S.A. John's O'Neil’s 3.14 1,000 x_y", "u.s.a john o'neil 3.14 1,000 x_y"),
        ("don't", "don't"),
        ("e-mail", "e mail"),
        ("日本語 テスト", "日 本 語 テスト"),
        # words with a letter or a digit only; quotes around a word are none of it
        ("'quoted' -- (1) § ...", "quot 1"),
        # two letters are left as they are, as Porter's own program does
        ("as is us Us'S", "us us"),
        # Hebrew keeps a quote between two letters and an apostrophe behind one (rules WB7a to WB7c)
        ("שב\"כ צ'", "שב\"כ צ'"),
        # a narrow no-break space joins (WB13a), a plain no-break space parts
        ("10\u202f000 10\xa0000", "10\u202f000 10 000"),
        ("İSTANBUL ΟΔΟΣ", "istanbul οδοσ"),
        ("👩‍👩‍👧 🇫🇷 x", "👩‍👩‍👧 🇫🇷 x"),
        ("", ""),
    ],
)
def test_terms_are_those_of_lucene(analyser: EnglishAnalyser, text, terms):
    assert analyser.terms(text) == terms.split(" ") * bool(terms)
    assert analyser.joined(text) == terms
    assert analyser.spaced(text).split() == terms.split()


def test_a_long_word_is_cut_at_255_letters(analyser: EnglishAnalyser):
    assert [len(term) for term in analyser.terms("1" * 600)] == [255, 255, 90]


def test_the_stop_list_is_lucenes_33_words(analyser: EnglishAnalyser):
    assert len(STOP_WORDS) == 33
    assert analyser.terms(" ".join(STOP_WORDS)) == []


def test_cached_texts_give_the_same_terms(analyser: EnglishAnalyser):
    text = "Stars' deaths are dying, relational stars."
    assert analyser.terms(text) == analyser.terms(text) == ["star", "death", "dy", "relat", "star"]


def test_every_stem_is_that_of_porters_own_program_with_its_later_rules():
    oracle = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)
    endings = _ENDINGS.split()
    draw, stem = random.Random(0), _stemmer()
    letters = "aaeeiioouuyybcdfghklmnprstvwxzqj19"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(40_000)]
    words = [word + "".join(draw.choices(endings, k=draw.randint(0, 3))) for word in words]
    words += ["".join(three) for three in product("aeybdlsz", repeat=3)]
    assert [(word, stem(word)) for word in words if stem(word) != oracle.stem(word, to_lowercase=False)] == []


def test_many_texts_at_once_give_the_terms_of_each(analyser: EnglishAnalyser):
    texts = [
        "The runners' running\u2003cities.",
        "",
        " \t ",
        "10\u202f000 one\u202ftwo",
        "a\x00b\x1cnews\x85of dogs\n",
        "日本語 テスト",
    ]
    texts += [" ".join(chr(code) + "ies" for code in range(start, start + 64)) for start in range(0x20, 0x3000, 64)]
    fresh = EnglishAnalyser()
    found = [[term for term in text.split(" ") if term] for text in fresh.spaced_all(texts)]
    assert found == [analyser.terms(text) for text in texts]
    assert fresh.spaced_all([]) == []


@pytest.mark.parametrize("mark", [chr(code) for code in range(33, 127) if not chr(code).isalnum()])
def test_punctuation_around_a_word_follows_uax29(analyser: EnglishAnalyser, mark):
    find = _word_finder()
    for piece in (f"{mark}Dogs", f"Dogs{mark}", f"{mark}{mark}Dogs{mark}", f"({mark}Dogs{mark})."):
        assert analyser.terms(piece) == [_stemmer()(word.lower()) for word in find(piece)]
