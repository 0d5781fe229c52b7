"""Dense and hybrid retrieval: an embedded index with the vectors of its passages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from graftwork.core.messages import say
from graftwork.errors import ConfigError
from graftwork.retrieval.embedded import EmbeddedIndex
from graftwork.retrieval.retriever import RETRIEVERS, Hit, Passage, check_k
from graftwork.retrieval.text_encoder import TextEncoder
from graftwork.retrieval.vectors import RECORD_FILE, VectorStore, vectors_folder

RANK_CONSTANT = 60
"""k of reciprocal rank fusion."""
DEPTH = 100
"""Minimum number of hits of each ranking that are fused."""


class VectorIndex:
    """Embedded index whose passages are found by their vectors, or by words and vectors.

    dense: score is the cosine of the vectors of question and passage. hybrid: score is Σ 1 / (60 + rank) over the
    rankings of BM25 and of the vectors, with ranks from 1.

    Source: Cormack et al., *Reciprocal Rank Fusion*, with their constant 60.

    Args:
        folder: Folder of the index, next to which the vectors are.
        retriever: dense or hybrid; None for the mode that the vectors were built for.
        encoder: Encoder of questions; None loads the one that the vectors were built with.

    Raises:
        ConfigError: If there are no vectors, or the encoder is another one than that of the vectors.
    """

    def __init__(self, folder: str | Path, retriever: str | None = None, *, encoder: TextEncoder | None = None) -> None:
        self.text = EmbeddedIndex(folder)
        self.folder = self.text.folder
        place = vectors_folder(folder)
        if not (place / RECORD_FILE).exists():
            raise ConfigError(
                f"Found no vectors of {folder}; expected some for {retriever or 'dense or hybrid'} retrieval. Build "
                "them with `graftwork index -o INDEX --retriever hybrid --encoder MODEL`."
            )
        if encoder is None:
            encoder = TextEncoder(_recorded_encoder(place))
        self.store = VectorStore(place, encoder)
        self.retriever = retriever or str(self.store.record["retriever"])
        if self.retriever not in RETRIEVERS[1:]:
            raise ConfigError(f"Found retriever {self.retriever!r}; expected one of: {', '.join(RETRIEVERS)}.")
        if encoder.digest != self.store.record["encoder_digest"]:
            raise ConfigError(
                f"The vectors of {folder} were computed with {self.store.record['encoder']} of other weights than "
                f"{encoder.name}; their products mean nothing. Name that encoder, or build the vectors again."
            )
        if not self.store.is_current(self.text) and (count := self.store.synchronize(self.text)):
            say(f"Encoded {count} passages of {folder} that had no vector.")

    @property
    def record(self) -> dict[str, Any]:
        """Commit record of the index."""
        return self.text.record

    @property
    def warning(self) -> str | None:
        """Problem of the index; None if there is none."""
        return self.text.warning

    def __len__(self) -> int:
        return len(self.text)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Best passages of each query, at most `k`; equal scores are sorted by id."""
        check_k(k)
        if not queries:
            return []
        depth = max(DEPTH, k)
        near = [self.store.nearest(vector, depth) for vector in self.store.encoder.vectors(list(queries))]
        if self.retriever == "dense":
            return [self._hits(found, k) for found in near]
        words = self.text.search(queries, depth)
        return [
            self._hits(fused([[hit.id for hit in hits], [name for name, _ in found]]), k)
            for hits, found in zip(words, near, strict=True)
        ]

    def index_fingerprint(self) -> str:
        """Fingerprint of contents, mode and encoder. See `Retriever`."""
        parts = (self.text.index_fingerprint(), self.retriever, self.store.record["encoder_digest"])
        return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def passages(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Passages with the given ids, by id; missing ids are skipped."""
        return self.text.passages(ids)

    def add(self, passages: Iterable[Passage]) -> int:
        """Add passages with their vectors, replacing those with the same id. See `EmbeddedIndex.add`."""
        given = list(passages)
        count = self.text.add(given)
        self.store.change(self.text, given, [])
        return count

    def delete(self, ids: Iterable[str]) -> int:
        """Delete passages and their vectors."""
        names = list(ids)
        count = self.text.delete(names)
        self.store.change(self.text, [], names)
        return count

    def erase(self, ids: Iterable[str]) -> int:
        """Delete passages and their vectors physically. See `EmbeddedIndex.erase`."""
        names = list(ids)
        count = self.text.erase(names)
        self.store.change(self.text, [], names, erase=True)
        return count

    def refresh(self) -> bool:
        """Move to the newest committed state. Return True if another process wrote."""
        moved = self.text.refresh()
        if moved or not self.store.is_current(self.text):
            self.store.refresh()
        return moved

    def reopened(self) -> VectorIndex:
        """Return another handle on the same index, with the same encoder."""
        return VectorIndex(self.folder, self.retriever, encoder=self.store.encoder)

    def _hits(self, ranked: Sequence[tuple[str, float]], k: int) -> list[Hit]:
        # a passage that was deleted a moment ago may have a vector still
        texts = self.text.passages([name for name, _ in ranked[: 2 * k]])
        kept = [(texts[name], score) for name, score in ranked if name in texts][:k]
        return [Hit(one.id, one.title, one.text, score, rank) for rank, (one, score) in enumerate(kept)]


def fused(rankings: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """Reciprocal rank fusion: ids with Σ 1 / (60 + rank) over the rankings that contain them, best first."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, start=1):
            scores[name] = scores.get(name, 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda one: (-one[1], one[0]))


def build_vectors(folder: str | Path, encoder: str, retriever: str) -> VectorIndex:
    """Compute the vectors of all passages of an embedded index; a build that was stopped goes on.

    Args:
        folder: Folder of the index.
        encoder: Folder or hub id of the encoder.
        retriever: Mode that searches use by default: dense or hybrid.
    """
    if retriever not in RETRIEVERS[1:]:
        raise ConfigError(f"Found retriever {retriever!r}; expected one of: {', '.join(RETRIEVERS[1:])}.")
    loaded, place = TextEncoder(encoder), vectors_folder(folder)
    store = VectorStore(place, loaded) if (place / RECORD_FILE).exists() else None
    if store is None or store.record["encoder_digest"] != loaded.digest:
        VectorStore.create(place, loaded, retriever)
    elif store.record["retriever"] != retriever:
        store.set_retriever(retriever)
    return VectorIndex(folder, encoder=loaded)


def _recorded_encoder(place: Path) -> str:
    from graftwork.core.files import read_json

    return str(read_json(place / RECORD_FILE)["encoder"])
