"""Protocol of retrieval engines, and the types of passages and hits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from hashlib import blake2b
from typing import Any, Protocol

from graftwork.errors import ConfigError, GraftworkError
from graftwork.retrieval.analysis import ANALYSER

K1 = 1.2
"""Term frequency saturation of BM25."""
B = 0.75
"""Length normalisation of BM25."""
TIE_BREAKER = 0.5
"""Weight of the lower of the two field scores, title and text; the higher one has weight 1."""

RETRIEVERS = ("bm25", "dense", "hybrid")
"""Ways of finding passages in an embedded index."""
PASSAGE_MARK = ":passage"
"""Separates the id of a document and the number of its passage in the passage's id."""
_PART = re.compile(rf"(.+){PASSAGE_MARK}\d+", re.DOTALL)
UNUSABLE_IN_IDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that no id contains: control characters and line separators."""
ENGINE_SCALE = K1 + 1
"""Constant factor of the scores of Elasticsearch and tantivy; it does not affect the ranking."""


class IncompleteIndexError(GraftworkError, RuntimeError):
    """An index has no complete commit record, or holds another number of passages than its commit record."""


class DamagedIndexError(GraftworkError, RuntimeError):
    """A file of an index differs from its commit record, or the engine cannot read it."""


class IndexLockedError(GraftworkError, RuntimeError):
    """Another writer holds the lock of the index."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Text unit of a corpus, with id and title."""

    id: str
    text: str
    title: str = ""

    def digest(self) -> int:
        """128-bit digest of id, title and text."""
        hasher = blake2b(digest_size=16)
        for part in (self.id, self.title, self.text):
            data = part.encode("utf-8", "surrogatepass")
            hasher.update(len(data).to_bytes(8, "little") + data)
        return int.from_bytes(hasher.digest(), "little")


@dataclass(frozen=True, slots=True)
class Hit:
    """Retrieved passage with score and rank."""

    id: str
    title: str
    text: str
    score: float
    """BM25 score, without the constant factor `ENGINE_SCALE`; cosine or fused ranks for dense and hybrid retrieval."""
    rank: int
    """Rank, 0 for the best hit."""

    @property
    def document(self) -> str:
        """Id of the document that the passage was split from; the passage's own id if it was not."""
        found = _PART.fullmatch(self.id)
        return self.id if found is None else found[1]


class Retriever(Protocol):
    """Retrieval engine.

    Hits with equal scores are sorted by id, so that results are deterministic.
    """

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Best passages of each query, at most `k`; none for a query without indexed terms."""
        ...

    def index_fingerprint(self) -> str:
        """Fingerprint of contents and scoring; equal contents have equal fingerprints in all engines."""
        ...


def fingerprint(count: int, digest: int) -> str:
    """Fingerprint of an index of `count` passages whose digests sum to `digest`."""
    parts = {"analyser": ANALYSER, "k1": K1, "b": B, "tie_breaker": TIE_BREAKER, "count": count, "digest": digest}
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_k(k: int) -> int:
    """Return `k` if it is at least 1.

    Raises:
        ConfigError: If it is smaller than 1.
    """
    if k < 1:
        raise ConfigError(f"Found k {k}; expected at least 1 passage for each query.")
    return k


def drop_near_duplicates(hits: Iterable[Hit], k: int, ratio: float = 0.9) -> list[Hit]:
    """First `k` hits that are not near-duplicates of an earlier hit.

    Args:
        hits: Hits of one query, best first; pass more than `k`.
        k: Maximum number of hits to keep.
        ratio: Minimum `SequenceMatcher` ratio of two near-duplicate texts.

    Returns:
        Kept hits, with new ranks.
    """
    kept: list[Hit] = []
    for hit in hits:
        if len(kept) == k:
            break
        if not any(_similar(hit.text, other.text, ratio) for other in kept):
            kept.append(replace(hit, rank=len(kept)))
    return kept


def _similar(text: str, other: str, ratio: float) -> bool:
    matcher = SequenceMatcher(None, text, other, autojunk=False)
    # the two cheap upper bounds avoid nearly every full comparison
    return matcher.real_quick_ratio() >= ratio and matcher.quick_ratio() >= ratio and matcher.ratio() >= ratio


def check_record(where: str, record: Mapping[str, Any], count: int, *, allow_incomplete: bool) -> str | None:
    """Compare an index with its commit record.

    Args:
        where: Name of the index, for messages.
        record: Commit record.
        count: Number of passages in the index.
        allow_incomplete: Return a problem instead of raising.

    Returns:
        Description of the problem; None if there is none.

    Raises:
        IncompleteIndexError: If there is a problem and `allow_incomplete` is False.
    """
    expected = [record.get("count"), *record.get("pending", ())]
    if record.get("state") != "complete":
        problem = f"{where} was never finished: its state is {record.get('state')!r} with {count} passages"
    elif count not in expected:
        problem = f"{where} holds {count} passages; its commit record counts {expected[-1]}"
    elif record.get("analyser") != ANALYSER:
        problem = f"{where} was built with the analyser {record.get('analyser')!r}; expected {ANALYSER!r}"
    else:
        return None
    if allow_incomplete:
        return problem
    raise IncompleteIndexError(
        f"{problem}. Run `graftwork index` again to finish it, or pass --allow-incomplete to search the passages it "
        "has."
    )
