"""Stored queries and keys: shards and their index, read one sentence and one module at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from graftwork.core import faults
from graftwork.core.digests import file_digest
from graftwork.core.files import (
    append_record,
    apply_umask,
    read_json,
    read_lines,
    write_record,
)
from graftwork.core.readers import fields_of, join_inside, require
from graftwork.core.storage import writing
from graftwork.errors import CheckpointMismatchError, IncompleteRunError
from graftwork.methods.sparsefinder.graphs import gold_edges
from graftwork.surgery.masks import LazyMask

INDEX_FILE = "index.json"
SENTENCES_FILE = "sentences.jsonl"


@dataclass(frozen=True, slots=True)
class SiteData:
    """Description of an attention module whose queries and keys are stored."""

    path: str
    """Path of the module in the model."""
    heads: int
    """Number of query heads."""
    scale: float | tuple[float, ...]
    """Factor on query·key, one number or one per head; queries are stored without it."""
    causal: bool
    """True for the self-attention of a decoder."""
    cross: bool
    """True for cross-attention."""
    alpha: float | tuple[float, ...] | None = None
    """α of the module, or of each of its heads, at the time of extraction; None if unknown, as in earlier versions."""

    def gold_alpha(self, head: int, current: float | tuple[float, ...]) -> float:
        """α of the gold graph of a head: its own; 1.5 for α = 1, with which every pair has a positive probability.

        Args:
            head: Number of the head.
            current: Current α of the module, used if that of the extraction is unknown.
        """
        known = current if self.alpha is None else self.alpha
        alpha = known[head] if isinstance(known, tuple) else known
        return alpha if alpha > 1.0 else 1.5


@dataclass(frozen=True, slots=True, eq=False)
class HeadBatch:
    """Queries and keys of some sentences in one attention module, padded on the right."""

    query: Float[Tensor, "batch heads queries width"]
    key: Float[Tensor, "batch groups keys width"]
    query_real: Bool[Tensor, "batch queries"]
    """True for non-padding queries."""
    key_real: Bool[Tensor, "batch keys"]
    """True for non-padding keys."""
    site: SiteData

    @property
    def mask(self) -> LazyMask:
        """Mask of padding and causality."""
        shape = self.query.shape[0], self.query.shape[2], self.key.shape[2]
        return LazyMask(*shape, causal=self.site.causal, padding=self.key_real)

    @property
    def scale(self) -> float | Float[Tensor, " heads"]:
        """Factor on query·key, one number or one per head."""
        scale = self.site.scale
        return self.query.new_tensor(scale) if isinstance(scale, tuple) else scale

    @property
    def allowed(self) -> Bool[Tensor, "batch 1 queries keys"]:
        """True for pairs of non-padding queries and keys that causality allows."""
        return self.mask.dense(self.query.device) & self.query_real[:, None, :, None]  # [batch 1 queries 1]

    def gold(self, current: float | tuple[float, ...] = 1.5) -> Bool[Tensor, "batch heads queries keys"]:
        """Gold graph under the α of each head; `current` is used if that of the extraction is unknown."""
        alphas = [self.site.gold_alpha(head, current) for head in range(self.query.shape[1])]
        alpha = alphas[0] if len(set(alphas)) == 1 else self.query.new_tensor(alphas)[:, None, None]  # [heads 1 1]
        return gold_edges(self.query, self.key, self.mask, scale=self.scale, alpha=alpha, query_real=self.query_real)

    def to(self, device: torch.device) -> HeadBatch:
        """Copy with all tensors on another device."""
        query, key = self.query.to(device), self.key.to(device)
        return HeadBatch(query, key, self.query_real.to(device), self.key_real.to(device), self.site)


class QueriesKeys:
    """Stored queries and keys, read one sentence and one module at a time.

    Args:
        folder: Folder written by `extract` or `legacy.import_dump`.

    Raises:
        IncompleteRunError: If the folder has no index, or the extraction is incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: set[str] = set()
        if not (folder / INDEX_FILE).exists():
            raise IncompleteRunError(f"{folder} has no {INDEX_FILE}. Extract queries and keys first.")
        index = read_json(folder / INDEX_FILE)
        with fields_of(str(folder / INDEX_FILE), "identity, sites and sentences", error=CheckpointMismatchError):
            self.identity: Mapping[str, Any] = index["identity"]
            self.sites = tuple(_site(site) for site in index["sites"])
            index["sentences"] = int(index["sentences"])
        self.sentences = list(read_lines(folder / SENTENCES_FILE))
        if len(self.sentences) < index["sentences"]:
            raise IncompleteRunError(
                f"{folder} holds {len(self.sentences)} of {index['sentences']} sentences. Run the extraction again to "
                "resume it."
            )

    def __len__(self) -> int:
        return len(self.sentences)

    def read(self, sentence: int, site: int) -> tuple[Tensor, Tensor]:
        """Read the query [heads queries width] and key [groups keys width] of one sentence."""
        reader: Any = safe_open
        where = f"{self.folder / SENTENCES_FILE}, line {sentence + 1}"
        row = self.sentences[sentence]
        shard = join_inside(self.folder, require(row, "shard", str, where), where)
        self._verify(shard, row.get("shard_sha256"))
        with reader(shard, framework="pt") as file:
            query: Tensor = file.get_tensor(f"{sentence}.{site}.q")
            key: Tensor = file.get_tensor(f"{sentence}.{site}.k")
        return query.float(), key.float()

    def check(self) -> None:
        """Verify every shard.

        Raises:
            CheckpointMismatchError: If a shard has changed since it was written.
        """
        for number, row in enumerate(self.sentences, start=1):
            where = f"{self.folder / SENTENCES_FILE}, line {number}"
            self._verify(join_inside(self.folder, require(row, "shard", str, where), where), row.get("shard_sha256"))

    def _verify(self, shard: Path, recorded: str | None) -> None:
        """Compare a shard with its digest at its first use; shards of earlier versions have none."""
        if recorded is None or shard.name in self._verified:
            return
        if not shard.is_file() or file_digest(shard) != recorded:
            raise CheckpointMismatchError(
                f"{shard} is missing or has changed since it was written. Restore it, or remove {self.folder} to "
                "extract its queries and keys again."
            )
        self._verified.add(shard.name)

    def batch(self, sentences: Sequence[int], site: int) -> HeadBatch:
        """Read several sentences of one module as a padded batch."""
        return pad_heads([self.read(sentence, site) for sentence in sentences], self.sites[site])


def pad_heads(pairs: Sequence[tuple[Tensor, Tensor]], site: SiteData) -> HeadBatch:
    """Pad queries [heads queries width] and keys [groups keys width] of several sentences to one batch."""
    query, query_real = _padded([pair[0] for pair in pairs])
    key, key_real = _padded([pair[1] for pair in pairs])
    return HeadBatch(query, key, query_real, key_real, site)


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Padded rows [batch heads longest width], and True for non-padding tokens [batch longest]."""
    longest = max(row.shape[1] for row in rows)
    padded = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
    real = torch.stack([torch.arange(longest, device=row.device) < row.shape[1] for row in rows])
    return padded, real


def write_index(path: Path, identity: Mapping[str, Any], sites: Sequence[SiteData], count: int) -> None:
    """Write the index file: identity of model and text, number of sentences, and modules."""
    plain = [{name: getattr(site, name) for name in SiteData.__slots__} for site in sites]
    write_record(path, {"identity": dict(identity), "sentences": count, "sites": plain})


def write_shard(folder: Path, start: int, records: Sequence[Sequence[tuple[Tensor, Tensor]]], half: bool) -> None:
    """Write the queries and keys of consecutive sentences, then append the sentences to the list.

    Args:
        folder: Folder of the shards.
        start: Index of the first sentence.
        records: Query [heads queries width] and key [groups keys width] by sentence and module.
        half: Store float16.
    """
    dtype = torch.float16 if half else torch.float32
    name = f"shard-{start:06d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for offset, sites in enumerate(records):
        for site, pair in enumerate(sites):
            for letter, tensor in zip("qk", pair, strict=True):
                tensors[f"{start + offset}.{site}.{letter}"] = tensor.to(dtype).contiguous()
    temporary = folder / f".{name}.part"
    with writing(folder / name):
        save_file(tensors, temporary)
        apply_umask(temporary)
        faults.point("shard.written", folder / name)
        temporary.replace(folder / name)
        faults.point("shard.replaced", folder / name)
    digest = file_digest(folder / name)
    for offset, sites in enumerate(records):
        lengths = {"queries": sites[0][0].shape[1], "keys": sites[0][1].shape[1]}
        row = {"sentence": start + offset, "shard": name, "shard_sha256": digest, **lengths}
        append_record(folder / SENTENCES_FILE, row)


def _site(plain: Mapping[str, Any]) -> SiteData:
    """Module description of an index file."""
    site = SiteData(**plain)
    # JSON has no tuples
    if isinstance(site.scale, Sequence):
        site = replace(site, scale=tuple(site.scale))
    return replace(site, alpha=tuple(site.alpha)) if isinstance(site.alpha, Sequence) else site
