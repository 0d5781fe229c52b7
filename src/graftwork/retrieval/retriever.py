"""What every engine of retrieval offers, and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from hashlib import blake2b
from typing import Any, Protocol

from graftwork.errors import ConfigError, GraftworkError
from graftwork.retrieval.analysis import ANALYSER

K1 = 1.2
B = 0.75
TIE_BREAKER = 0.5
"""How much the worse of the two fields, title and text, adds to the better one."""

ENGINE_SCALE = K1 + 1
"""Elasticsearch and tantivy multiply every score by this, which changes no order."""


class IncompleteIndexError(GraftworkError, RuntimeError):
    """An index is not sealed, or holds another number of passages than its seal says."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that can be found."""

    id: str
    text: str
    title: str = ""

    def digest(self) -> int:
        """A number of 128 bits that stands for id, title and text."""
        hasher = blake2b(digest_size=16)
        for part in (self.id, self.title, self.text):
            data = part.encode("utf-8", "surrogatepass")
            hasher.update(len(data).to_bytes(8, "little") + data)
        return int.from_bytes(hasher.digest(), "little")


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found."""

    id: str
    title: str
    text: str
    score: float
    """BM25, without the constant factor that Elasticsearch puts in front."""
    rank: int
    """From 0 for the best."""


class Retriever(Protocol):
    """Finds passages for questions.

    Equal scores are put in the order of ids, so that the same index always gives the same answer.
    """

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """For every query its best passages, at most `k`; none for a query without any known word."""
        ...

    def index_fingerprint(self) -> str:
        """What names the contents and the way of scoring; equal for equal contents in whatever engine."""
        ...


def fingerprint(count: int, digest: int) -> str:
    """The fingerprint of an index that holds `count` passages whose digests add up to `digest`."""
    parts = {"analyser": ANALYSER, "k1": K1, "b": B, "tie_breaker": TIE_BREAKER, "count": count, "digest": digest}
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_k(k: int) -> int:
    """The number of passages to find, if it is one.

    Raises:
        ConfigError: If it is smaller than 1.
    """
    if k < 1:
        raise ConfigError(f"Found k {k}; expected at least 1 passage for each query.")
    return k


def drop_near_duplicates(hits: Iterable[Hit], k: int, ratio: float = 0.9) -> list[Hit]:
    """The first `k` hits none of which resembles an earlier one.

    Args:
        hits: Hits of one query, best first; ask for more than `k`.
        k: Hits to keep.
        ratio: Similarity of the character sequences from which on a text counts as the same.

    Returns:
        The hits kept, with new ranks.
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
    # the two quick bounds spare nearly every full comparison
    return matcher.real_quick_ratio() >= ratio and matcher.quick_ratio() >= ratio and matcher.ratio() >= ratio


def check_seal(where: str, seal: Mapping[str, Any], count: int, *, allow_incomplete: bool) -> str | None:
    """Compare an index with its seal.

    Returns:
        What is wrong with it, if that was allowed; None if nothing is.

    Raises:
        IncompleteIndexError: If something is wrong and that was not allowed.
    """
    expected = [seal.get("count"), *seal.get("pending", ())]
    if seal.get("state") != "complete":
        problem = f"{where} was never finished: its state is {seal.get('state')!r} with {count} passages"
    elif count not in expected:
        problem = f"{where} holds {count} passages; its seal says {expected[-1]}"
    elif seal.get("analyser") != ANALYSER:
        problem = f"{where} was built with the analyser {seal.get('analyser')!r}; expected {ANALYSER!r}"
    else:
        return None
    if allow_incomplete:
        return problem
    raise IncompleteIndexError(
        f"{problem}. Run `graftwork index` again to finish it, or pass --allow-incomplete to search what is there."
    )
