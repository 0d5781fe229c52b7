"""Behaviour that both engines share; the Elasticsearch half needs a server."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from graftwork.errors import ConfigError
from graftwork.retrieval import Passage
from graftwork.retrieval.analysis import EnglishAnalyser
from graftwork.retrieval.retriever import fingerprint

THREE = (
    Passage("1", "cat sat mat", "x"),
    Passage("2", "cat cat dog", "x"),
    Passage("3", "bird sang loud morn", "x"),
)


def stored_length(length: int) -> int:
    """A field's length as Lucene keeps it in one byte: exact to 40, then three bits behind the first, above 24."""
    if length <= 40:
        return length
    rest = length - 24
    shift = rest.bit_length() - 4
    return 24 + (rest >> shift << shift)


def bm25(query: str, texts: list[str]) -> list[float]:
    """The formula of the definition, over one field."""
    analyser = EnglishAnalyser()
    counted = [Counter(analyser.terms(text)) for text in texts]
    average = sum(sum(terms.values()) for terms in counted) / len(texts)
    scores = [0.0] * len(texts)
    for term in analyser.terms(query):
        found = sum(term in terms for terms in counted)
        weight = math.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
        for index, terms in enumerate(counted):
            length = stored_length(sum(terms.values()))
            frequency = terms[term]
            scores[index] += weight * frequency / (frequency + 1.2 * (0.25 + 0.75 * length / average))
    return scores


def test_scores_are_those_of_the_definition(build):
    (hits,) = build(*THREE).search(["cat"], 3)
    assert [(hit.id, hit.rank) for hit in hits] == [("2", 0), ("1", 1)]
    assert [hit.score for hit in hits] == pytest.approx([0.302253, 0.222751], abs=1e-6)


def test_the_higher_field_score_has_weight_1_and_the_other_the_tie_breaker(build):
    draw = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    passages = [
        Passage(f"{n:03}", " ".join(draw.choices(words, k=draw.randint(5, 150))), " ".join(draw.choices(words, k=3)))
        for n in range(120)
    ]
    query = "word1 word2 word3 word3"
    title, text = (bm25(query, [getattr(p, name) for p in passages]) for name in ("title", "text"))
    expected = [max(pair) + 0.5 * min(pair) for pair in zip(title, text, strict=True)]
    best = sorted(range(120), key=lambda index: (-expected[index], passages[index].id))[:10]
    (hits,) = build(*passages).search([query], 10)
    assert [hit.score for hit in hits] == pytest.approx([expected[index] for index in best], rel=1e-4)
    assert {hit.id for hit in hits} == {passages[index].id for index in best}


def test_equal_scores_come_in_the_order_of_ids_also_across_rank_k(build):
    names = [f"{n:02}" for n in range(20)]
    random.Random(1).shuffle(names)
    index = build(*(Passage(name, "the same text", "t") for name in names), parts=5)
    for k in (1, 3, 20):
        assert [hit.id for hit in index.search(["same"], k)[0]] == sorted(names)[:k]


def test_queries_without_a_known_word_and_k_beyond_the_index(build):
    index = build(*THREE)
    assert index.search(["", "the of", "zebra", "!?"], 2) == [[], [], [], []]
    assert len(index.search(["cat bird"], 50)[0]) == 3
    assert index.search([], 3) == []
    with pytest.raises(ConfigError, match="k 0"):
        index.search(["cat"], 0)


def test_hits_return_the_original_texts_in_the_order_of_the_queries(build):
    odd = Passage("a'b\"c", 'tab\t quote" newline\n end 😀 zebra', "T\u2028")
    index = build(odd, *THREE)
    answers = index.search(["zebra", "cat", "bird"] * 50, 1)
    assert [hits[0].id for hits in answers] == [odd.id, "2", "3"] * 50
    assert (answers[0][0].text, answers[0][0].title) == (odd.text, odd.title)


def test_query_syntax_is_plain_text(build):
    index = build(*THREE)
    # nothing is excluded by a minus; "title:x" is one word by Unicode's rules, which no passage holds
    assert {hit.id for hit in index.search(['title:x AND "cat" -dog* (mat'], 3)[0]} == {"1", "2"}


def test_the_fingerprint_depends_on_contents_alone(build, corpus, tmp_path):
    from graftwork.retrieval.embedded import build_embedded

    other = build_embedded(corpus(*reversed(THREE), name="other.jsonl"), tmp_path / "other")
    assert build(*THREE).index_fingerprint() == other.index_fingerprint()
    other.delete(["3"])
    changed = other.index_fingerprint()
    other.add([Passage("3", "another text", "x")])
    assert (
        len(
            {
                changed,
                other.index_fingerprint(),
                build_embedded(corpus(*THREE[:2], name="two.jsonl"), tmp_path / "two").index_fingerprint(),
            }
        )
        == 2
    )


def test_fingerprints_equal_those_of_stored_indexes():
    # gradient banks and augmented questions store fingerprints; other values make them look foreign
    assert fingerprint(3, 12345) == "bec53e77a4abd659ee96e06822df703f"
