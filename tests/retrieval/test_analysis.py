"""Terms that Elasticsearch's `english` gives; the expected ones are the specification's, and the Unicode annex's."""

import pytest

from graftwork.retrieval.analysis import STOP_WORDS, EnglishAnalyser


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
        ('שב"כ צ\'', 'שב"כ צ\''),
        # a narrow no-break space joins (WB13a), a plain no-break space parts
        ("10\u202f000 10\xa0000", "10\u202f000 10 000"),
        ("İSTANBUL ΟΔΟΣ", "istanbul οδοσ"),
        ("👩‍👩‍👧 🇫🇷 x", "👩‍👩‍👧 🇫🇷 x"),
        ("", ""),
    ],
)  # fmt: skip
def test_terms_are_those_of_lucene(analyser: EnglishAnalyser, text, terms):
    assert analyser.terms(text) == terms.split(" ") * bool(terms)
    assert analyser.joined(text) == terms
    assert analyser.spaced(text).split() == terms.split()


def test_a_long_word_is_cut_at_255_letters(analyser: EnglishAnalyser):
    assert [len(term) for term in analyser.terms("1" * 600)] == [255, 255, 90]


def test_the_stop_list_is_lucenes_33_words(analyser: EnglishAnalyser):
    assert len(STOP_WORDS) == 33
    assert analyser.terms(" ".join(STOP_WORDS)) == []


def test_a_text_seen_before_gives_the_same_terms(analyser: EnglishAnalyser):
    text = "Stars' deaths are dying, relational stars."
    assert analyser.terms(text) == analyser.terms(text) == ["star", "death", "dy", "relat", "star"]
