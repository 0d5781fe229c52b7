"""Pruned search: the hits, scores and order of a search that scores every passage."""

from __future__ import annotations

import random
from typing import Any

import pytest

from graftwork.retrieval import Passage, ranking
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.ranking import Ranking

WORDS = [f"word{number}" for number in range(40)]


@pytest.fixture
def build(corpus, tmp_path):
    """Builds an embedded index in a number of segments."""
    return lambda *rows, parts=1: build_embedded(
        corpus(*rows), tmp_path / "index", commit_passages=max(1, len(rows) // parts)
    )


def passages(draw: random.Random, count: int, longest: int) -> list[Passage]:
    """Short texts over few words, so that many scores are equal or nearly so."""
    shares = [1 / (number + 1) for number in range(len(WORDS))]
    return [
        Passage(
            f"{draw.randrange(10**6):06}-{number}",
            " ".join(draw.choices(WORDS, shares, k=draw.randint(1, longest))),
            " ".join(draw.choices(WORDS, shares, k=draw.randint(0, 6))),
        )
        for number in range(count)
    ]


def hits(index: EmbeddedIndex, question: str, k: int, prune_from: int) -> list[tuple[str, float]]:
    index.prune_from = prune_from
    return [(hit.id, hit.score) for hit in index.search([question], k)[0]]


@pytest.mark.parametrize(("seed", "longest"), [(0, 3), (1, 40)])
def test_pruned_hits_are_those_of_scoring_every_passage(build, seed, longest, monkeypatch):
    monkeypatch.setattr(ranking, "MOST_PRUNED", 1500)
    draw = random.Random(seed)
    rows = passages(draw, 1500, longest)
    index = build(*rows, parts=4)
    index.delete([row.id for row in rows[::7]])
    for _ in range(120):
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
        k = draw.choice([1, 2, 3, 10, 100, 1400])
        assert hits(index, question, k, 0) == hits(index, question, k, 10**9)


def test_a_passage_whose_title_alone_is_best_is_found(build):
    # the sum that weights the text fully ranks this passage behind all others
    others = [Passage(f"t{number:02}", "lion lion zebra", "x") for number in range(60)]
    index = build(*others, Passage("title", "none of them", "lion zebra"))
    assert [name for name, _ in hits(index, "lion zebra", 1, 0)] == ["title"]
    assert hits(index, "lion zebra", 1, 0) == hits(index, "lion zebra", 1, 10**9)


def test_pruned_search_fetches_few_passages(build, monkeypatch):
    index = build(*passages(random.Random(2), 3000, 30), parts=2)
    fetched: list[int] = []
    original: Any = Ranking._hits

    def counted(self: Ranking, query: Any, count: int) -> Any:
        fetched.append(count)
        return original(self, query, count)

    monkeypatch.setattr(Ranking, "_hits", counted)
    assert len(hits(index, "word3 word9 word11", 3, 0)) == 3
    assert sum(fetched) <= 400
