"""Best passages of an embedded index, by a disjunction maximum with a tie-breaker over title and text.

Scoring every passage that contains a term of the question grows with the index. Sums of term scores are pruned by
block-max WAND, which skips blocks of postings whose highest possible score is too low; a maximum with a tie-breaker is
not. But with scores a of the title and b of the text and a tie-breaker τ ≤ 1

    max(a, b) + τ · min(a, b) = max(b + τ · a, a + τ · b)

so a passage with at least a score t is found by the first sum, or has a > b and therefore a > t / (1 + τ), which a
search of titles alone finds. Titles are short, so this search is cheap.

Source: Broder et al., 2003 (WAND), and Ding and Suel, 2011 (block-max indexes), for the pruning of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.retrieval.index_storage import FIELDS
from graftwork.retrieval.retriever import TIE_BREAKER, Passage

PRUNE_FROM = 500_000
"""Number of passages from which pruned search is faster than scoring every passage with a term of the question."""
MOST_PRUNED = 3
"""Number of hits up to which pruned search is faster; more hits are found by scoring every passage."""
ROUNDING = 1e-5
"""Relative difference by which the engine's sums of the same terms differ at most, in another order of additions."""
SPARE = 8
"""Number of passages fetched first beyond the number of hits, for ties and rounding."""
TITLES = 32
"""Number of passages that the search of titles fetches first."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranking of the passages of one state of an index.

    Args:
        searcher: Searcher of the engine.
        schema: Schema of the index.
        passage: Reads the passage at an address.
        prune_from: Number of passages from which search is pruned.
    """

    searcher: Any
    schema: Any
    passage: Callable[[Any], Passage]
    prune_from: int = PRUNE_FROM

    def best(self, terms: Sequence[str], k: int) -> list[tuple[float, Passage]]:
        """Return all passages with at least the score of rank `k`, with their scores, in no particular order.

        Args:
            terms: Terms of the question, with repetitions.
            k: Number of hits.
        """
        whole = self._maximum(terms)
        if self.searcher.num_docs < self.prune_from or k > MOST_PRUNED:
            return [(score, self.passage(address)) for score, address in self._exhaustive(whole, k)]
        found = {one.id: one for one in map(self.passage, self._candidates(terms, k))}
        return self._scored(whole, found)

    def _maximum(self, terms: Sequence[str]) -> Any:
        """Query of the score."""
        from tantivy import Query

        return Query.disjunction_max_query([self._field(name, terms) for name in FIELDS], TIE_BREAKER)

    def _sum(self, terms: Sequence[str]) -> Any:
        """Query of the score of the text plus that of the title times the tie-breaker."""
        from tantivy import Occur, Query

        # a factor on single terms, because only sums of single terms are pruned
        titles = [Query.boost_query(self._term("title", term), TIE_BREAKER) for term in terms]
        parts = [*titles, *(self._term("text", term) for term in terms)]
        return Query.boolean_query([(Occur.Should, part) for part in parts])

    def _field(self, name: str, terms: Sequence[str]) -> Any:
        """Query of the score of one field."""
        from tantivy import Occur, Query

        return Query.boolean_query([(Occur.Should, self._term(name, term)) for term in terms])

    def _term(self, field: str, term: str) -> Any:
        from tantivy import Query

        return Query.term_query(self.schema, f"{field}_terms", term, "freq")

    def _hits(self, query: Any, count: int) -> Any:
        """Scores and addresses of the best passages of a query, best first."""
        return self.searcher.search(query, count, count=False).hits

    def _exhaustive(self, query: Any, k: int) -> list[tuple[float, Any]]:
        """Scores and addresses of all passages with at least the score of rank k."""
        wanted = k + 1
        while True:
            found = self._hits(query, wanted)
            # ties are ordered by segment: all hits that tie with rank k are fetched before sorting by id
            if len(found) < wanted or found[-1][0] < found[k - 1][0]:
                break
            wanted *= 2
        least = found[min(k, len(found)) - 1][0] if found else 0.0
        return [(score, address) for score, address in found if score >= least]

    def _candidates(self, terms: Sequence[str], k: int) -> list[Any]:
        """Addresses of all passages that can have at least the score of rank k."""
        whole, titles = self._sum(terms), self._field("title", terms)
        best = self._until(whole, k, lambda found: found[k - 1][0] * (1 - ROUNDING) if len(found) >= k else 0.0)
        least = best[k - 1][0] * (1 - ROUNDING) if len(best) >= k else 0.0
        enough = least / (1 + TIE_BREAKER)
        named = self._until(titles, TITLES, lambda _: enough)
        chosen = [address for score, address in best if score >= least]
        chosen += [address for score, address in named if score >= enough]
        return list({(address.segment_ord, address.doc): address for address in chosen}.values())

    def _until(self, query: Any, count: int, least: Callable[[Any], float]) -> Any:
        """Best passages of a query, down to a score that depends on those found; about `count`, or more."""
        wanted = count + SPARE
        while True:
            found = self._hits(query, wanted)
            if len(found) < wanted or found[-1][0] < least(found):
                return found
            wanted *= 4

    def _scored(self, query: Any, passages: dict[str, Passage]) -> list[tuple[float, Passage]]:
        """Score passages, by id, with a query: bit by bit the scores that all passages would get."""
        from tantivy import Occur, Query

        if not passages:
            return []
        only = Query.const_score_query(Query.term_set_query(self.schema, "id", list(passages)), 0.0)
        both = Query.boolean_query([(Occur.Must, query), (Occur.Must, only)])
        found = self._hits(both, len(passages))
        return [(score, passages[self.searcher.doc(address).get_first("id")]) for score, address in found]
