"""Extraction of queries and keys on real text: recorded in the forward pass, stored in shards, read per sentence."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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
    drop_torn_line,
    read_json,
    read_lines,
    write_record,
    write_records,
)
from graftwork.core.progress import Progress
from graftwork.core.readers import fields_of, join_inside, require
from graftwork.core.storage import writing
from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError
from graftwork.grafting.identity import matches_digest, weights_digest
from graftwork.methods.sparsefinder.modules import (
    AttentionCall,
    SparsefinderAttention,
    observe_calls,
    sparsefinder_modules,
)
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import pretrained
from graftwork.training.running_text import TextBatch

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
SENTENCES_FILE = "sentences.jsonl"
EXTRACTION_SEED = 0
"""Seed of the masks of masked language models, together with the index of the chunk."""
_SHORT_FINGERPRINT = 16
"""Digits of the fingerprint of a model in extractions of earlier versions, which covered parts of the weights."""
BATCH = 8
"""Number of sentences per forward pass; each batch is one shard."""


Collate = Callable[[Sequence[Any]], Mapping[str, Tensor]]
"""Collator of a batch of encoded examples."""


class Rows(Protocol):
    """Sized, indexable collection of encoded examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class SiteData:
    """Description of an attention module whose queries and keys are stored."""

    path: str
    """Path of the module in the model."""
    heads: int
    """Number of query heads."""
    scale: float
    """Factor on query·key; queries are stored without it."""
    causal: bool
    """True for the self-attention of a decoder."""
    cross: bool
    """True for cross-attention."""


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
    def allowed(self) -> Bool[Tensor, "batch 1 queries keys"]:
        """True for pairs of non-padding queries and keys that causality allows."""
        return self.mask.dense(self.query.device) & self.query_real[:, None, :, None]  # [batch 1 queries 1]

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
            self.sites = tuple(SiteData(**site) for site in index["sites"])
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


def extract(
    model: nn.Module,
    dataset: Rows,
    collate: Collate,
    folder: Path,
    *,
    samples: int,
    half_precision: bool = False,
) -> QueriesKeys:
    """Store the queries and keys of the first `samples` examples, resumably.

    Recording does not change the outputs of the model. Padding is removed. A second call extracts only the missing
    sentences.

    Args:
        model: Converted model.
        dataset: Encoded examples.
        collate: Collator of a batch of examples.
        folder: Output folder of the index and of the shards, one per batch.
        samples: Maximal number of sentences.
        half_precision: Store float16.

    Raises:
        ConfigError: If the folder contains queries and keys of another model or text.
    """
    if isinstance(collate, TextBatch):
        # the token masks of evaluation, identical after a resume
        collate = replace(collate, seed=EXTRACTION_SEED)
    count = min(samples, len(dataset))
    rows: list[Any] = [dataset[index] for index in range(count)]
    identity: dict[str, Any] = {
        "model": fingerprint(model),
        "text": _digest([list(row["input_ids"]) for row in rows]),
        "half_precision": half_precision,
    }
    if model is not pretrained(model):
        # merging an adapter rounds the weights, so that the saved model has another digest
        identity["adapter"] = True
    index = folder / INDEX_FILE
    _check_reusable(index, identity)
    done: list[Any] = []
    if index.exists():
        done = _listed(folder / SENTENCES_FILE, count)
    training = model.training
    model.eval()
    with Progress("queries and keys", total=count) as progress:
        progress.advance(len(done))
        for start in range(len(done), count, BATCH):
            batch = collate(rows[start : start + BATCH])
            records, sites = record(model, batch)
            if not index.exists():
                write_index(index, identity, sites, count)
            write_shard(folder, start, records, half_precision)
            progress.advance(len(rows[start : start + BATCH]))
    model.train(training)
    return QueriesKeys(folder)


def _check_reusable(index: Path, identity: Mapping[str, Any]) -> None:
    """Check that stored queries and keys are of this model and text; remove those of a version without digests."""
    if not index.exists():
        return
    with fields_of(str(index), "identity, sites and sentences", error=CheckpointMismatchError):
        recorded = dict(read_json(index)["identity"])
    if recorded == identity:
        return
    if len(str(recorded.get("model"))) == _SHORT_FINGERPRINT:
        logger.warning("%s records no digest of the weights, so it is extracted again.", index.parent)
        shutil.rmtree(index.parent)
        return
    raise ConfigError(
        f"{index.parent} holds queries and keys of another model or text. Remove it, or give another run folder."
    )


def check_origin(stored: QueriesKeys, model: nn.Module) -> None:
    """Check that queries and keys were extracted from a model.

    Imported ones, those of earlier versions and those of a model with an adapter are of unknown origin.

    Raises:
        CheckpointMismatchError: If the weights differ.
    """
    recorded = str(stored.identity.get("model", ""))
    if len(recorded) <= _SHORT_FINGERPRINT or stored.identity.get("adapter"):
        return
    if not matches_digest(model, recorded, without=GRAFT):
        raise CheckpointMismatchError(
            f"{stored.folder} holds queries and keys of other weights than those of the model. Train again with "
            "--overwrite, or restore the model."
        )


def _listed(path: Path, count: int) -> list[dict[str, Any]]:
    """Sentences of complete batches; others are removed, so that resumed batches are those of an uninterrupted pass."""
    drop_torn_line(path)
    done = list(read_lines(path))
    whole = len(done) if len(done) == count else len(done) // BATCH * BATCH
    if whole < len(done):
        write_records(path, done[:whole])
    return done[:whole]


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


@torch.no_grad()
def record(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[list[tuple[Tensor, Tensor]]], list[SiteData]]:
    """Record the queries and keys of one batch, by sentence and module, without padding, on the CPU.

    Raises:
        ConfigError: If the model adds a position bias to its scores, which queries and keys do not contain.
    """
    grafts = sparsefinder_modules(model)
    paths = {id(graft): path for path, graft in grafts.items()}
    found: dict[str, tuple[SiteData, list[tuple[Tensor, Tensor]]]] = {}

    def observer(graft: SparsefinderAttention, call: AttentionCall) -> None:
        path = paths[id(graft)]
        if call.bias is not None:
            raise ConfigError(
                f"The scores of {path} have a position bias. Expected scores that are query·key alone. Choose a "
                "grouping by position, or none."
            )
        site = SiteData(path, graft.heads, call.scale, graft.causal, graft.cross)
        queries = real_queries(path, call, batch, graft.cross)
        keys = call.mask.padding
        rows: list[tuple[Tensor, Tensor]] = []
        for row in range(len(call.query)):
            own = torch.ones_like(call.key[row, 0, :, 0], dtype=torch.bool) if keys is None else keys[row]
            rows.append((call.query[row][:, queries[row]].cpu(), call.key[row][:, own].cpu()))
        found[path] = site, rows

    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    with observe_calls(model, observer):
        model(**inputs)
    sites = [found[path][0] for path in grafts]
    records = [[found[path][1][row] for path in grafts] for row in range(len(batch["input_ids"]))]
    return records, sites


def real_queries(
    path: str, call: AttentionCall, batch: Mapping[str, Any], cross: bool
) -> Bool[Tensor, "batch queries"]:
    """True for non-padding queries, as far as the mask and the labels of the batch determine them."""
    shape = call.query.shape[0], call.query.shape[2]
    labels = batch.get("labels")
    if "decoder" in path.split(".") and labels is not None and tuple(labels.shape) == shape and "input_ids" in batch:
        mask = call.mask.padding
        if cross or mask is None:
            return labels != -100
    if not cross and call.mask.padding is not None and call.mask.queries == call.mask.keys:
        return call.mask.padding
    return torch.ones(shape, dtype=torch.bool, device=call.query.device)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights of a model, without the weights of Sparsefinder."""
    return weights_digest(model, without=GRAFT)


def _digest(value: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
