"""Queries and keys of a model on real text: recorded behind the seam, stored in shards, read back one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graftwork.core.files import append_line, drop_torn_line, read_json, read_lines, write_json
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, DataError, IncompleteRunError
from graftwork.methods.sparsefinder.modules import Seen, SparsefinderAttention, sparsefinder_modules, watching
from graftwork.surgery.masks import LazyMask, PositionBias
from graftwork.training.running_text import TextBatch

INDEX_FILE = "index.json"
SENTENCES_FILE = "sentences.jsonl"
EXTRACTION_SEED = 0
"""Masks of masked language models depend on this and the number of the chunk."""
BATCH = 8
"""Sentences that are run through the model together; each such batch is one shard."""


@dataclass(frozen=True, slots=True)
class SiteData:
    """What is known of one attention module whose queries and keys are stored."""

    path: str
    heads: int
    scale: float
    """Factor on query·key; queries are stored without it."""
    causal: bool
    cross: bool


@dataclass(frozen=True, slots=True, eq=False)
class HeadBatch:
    """Queries and keys of some sentences in one attention module, padded on the right."""

    query: Tensor
    """batch heads queries width"""
    key: Tensor
    """batch groups keys width"""
    query_real: Tensor
    key_real: Tensor
    site: SiteData

    @property
    def mask(self) -> LazyMask:
        """Padding and causality."""
        shape = self.query.shape[0], self.query.shape[2], self.key.shape[2]
        return LazyMask(*shape, causal=self.site.causal, padding=self.key_real)

    @property
    def allowed(self) -> Tensor:
        """Real queries × real keys, causal where that holds [batch 1 queries keys]."""
        return self.mask.dense(self.query.device) & self.query_real[:, None, :, None]


class QueriesKeys:
    """Stored queries and keys, read one sentence and one module at a time.

    Args:
        folder: What `extract` wrote, or `legacy.import_dump`.

    Raises:
        IncompleteRunError: If there is nothing, or an extraction was stopped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / INDEX_FILE).exists():
            raise IncompleteRunError(f"{folder} holds no {INDEX_FILE}. Extract queries and keys first.")
        index = read_json(folder / INDEX_FILE)
        self.identity: Mapping[str, Any] = index["identity"]
        self.sites = tuple(SiteData(**site) for site in index["sites"])
        self.sentences = list(read_lines(folder / SENTENCES_FILE))
        if len(self.sentences) < index["sentences"]:
            raise IncompleteRunError(
                f"{folder} holds {len(self.sentences)} of {index['sentences']} sentences. Run the extraction again; it "
                "goes on where it was."
            )

    def __len__(self) -> int:
        return len(self.sentences)

    def read(self, sentence: int, site: int) -> tuple[Tensor, Tensor]:
        """Query [heads queries width] and key [groups keys width] of one sentence."""
        with safe_open(self.folder / self.sentences[sentence]["shard"], framework="pt") as file:
            return file.get_tensor(f"{sentence}.{site}.q").float(), file.get_tensor(f"{sentence}.{site}.k").float()

    def batch(self, sentences: Sequence[int], site: int) -> HeadBatch:
        """Several sentences together."""
        return pad_heads([self.read(sentence, site) for sentence in sentences], self.sites[site])


def pad_heads(pairs: Sequence[tuple[Tensor, Tensor]], site: SiteData) -> HeadBatch:
    """Queries and keys of unequal lengths as one batch."""
    query, query_real = _padded([pair[0] for pair in pairs])
    key, key_real = _padded([pair[1] for pair in pairs])
    return HeadBatch(query, key, query_real, key_real, site)


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(row.shape[1] for row in rows)
    padded = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
    real = torch.stack([torch.arange(longest, device=row.device) < row.shape[1] for row in rows])
    return padded, real


def extract(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]],
    folder: Path,
    *,
    samples: int,
    half_precision: bool = False,
) -> QueriesKeys:
    """Store the queries and keys of the first `samples` examples; after a stop, only those that are missing.

    The model computes what it computes; its modules are only watched. Padding is cut off.

    Args:
        model: A converted model.
        dataset: Encoded examples.
        collate: Makes a batch of examples.
        folder: Receives shards, one for each batch, and an index.
        samples: Sentences at most.
        half_precision: Store float16.

    Raises:
        ConfigError: If the folder holds the queries and keys of another model or of other text.
    """
    if isinstance(collate, TextBatch):
        # the masks that evaluation will hide tokens behind, and the same ones after a stop
        collate = replace(collate, seed=EXTRACTION_SEED)
    count = min(samples, len(dataset))
    rows = [dataset[index] for index in range(count)]
    identity = {
        "model": fingerprint(model),
        "text": _digest([list(row["input_ids"]) for row in rows]),
        "half_precision": half_precision,
    }
    index = folder / INDEX_FILE
    if index.exists() and read_json(index)["identity"] != identity:
        raise ConfigError(
            f"{folder} holds queries and keys of another model or text. Remove it, or give another run folder."
        )
    done = []
    if index.exists():
        drop_torn_line(folder / SENTENCES_FILE)
        done = list(read_lines(folder / SENTENCES_FILE))
    training = model.training
    model.eval()
    with Progress("queries and keys", total=count) as progress:
        progress.advance(len(done))
        for start in range(len(done), count, BATCH):
            batch = collate(rows[start : start + BATCH])
            records, sites = record(model, batch)
            if not index.exists():
                _write_index(index, identity, sites, count)
            _write_shard(folder, start, records, half_precision)
            progress.advance(len(rows[start : start + BATCH]))
    model.train(training)
    return QueriesKeys(folder)


def _write_index(path: Path, identity: Mapping[str, Any], sites: Sequence[SiteData], count: int) -> None:
    plain = [{name: getattr(site, name) for name in SiteData.__slots__} for site in sites]
    write_json(path, {"identity": dict(identity), "sentences": count, "sites": plain})


def _write_shard(folder: Path, start: int, records: Sequence[Sequence[tuple[Tensor, Tensor]]], half: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    name = f"shard-{start:06d}.safetensors"
    tensors = {}
    for offset, sites in enumerate(records):
        for site, pair in enumerate(sites):
            for letter, tensor in zip("qk", pair, strict=True):
                tensors[f"{start + offset}.{site}.{letter}"] = tensor.to(dtype).contiguous()
    temporary = folder / f".{name}.part"
    save_file(tensors, temporary)
    temporary.replace(folder / name)
    for offset, sites in enumerate(records):
        lengths = {"queries": sites[0][0].shape[1], "keys": sites[0][1].shape[1]}
        append_line(folder / SENTENCES_FILE, {"sentence": start + offset, "shard": name, **lengths})


@torch.no_grad()
def record(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[list[tuple[Tensor, Tensor]]], list[SiteData]]:
    """Queries and keys of one batch, by sentence and then by module, without padding, on the CPU.

    Raises:
        ConfigError: If scores of the model have a position bias, which queries and keys do not tell.
    """
    grafts = sparsefinder_modules(model)
    paths = {id(graft): path for path, graft in grafts.items()}
    found: dict[str, tuple[SiteData, list[tuple[Tensor, Tensor]]]] = {}

    def watch(graft: SparsefinderAttention, seen: Seen) -> None:
        path = paths[id(graft)]
        if seen.bias is not None and not (isinstance(seen.bias, PositionBias) and seen.bias.table is None):
            raise ConfigError(f"The scores of {path} have a position bias, which queries and keys do not tell.")
        site = SiteData(path, graft.heads, seen.scale, graft.causal, graft.cross)
        queries = real_queries(path, seen, batch, graft.cross)
        keys = seen.mask.padding
        rows = []
        for row in range(len(seen.query)):
            own = torch.ones_like(seen.key[row, 0, :, 0], dtype=torch.bool) if keys is None else keys[row]
            rows.append((seen.query[row][:, queries[row]].cpu(), seen.key[row][:, own].cpu()))
        found[path] = site, rows

    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    with watching(model, watch):
        model(**inputs)
    sites = [found[path][0] for path in grafts]
    records = [[found[path][1][row] for path in grafts] for row in range(len(batch["input_ids"]))]
    return records, sites


def real_queries(path: str, seen: Seen, batch: Mapping[str, Any], cross: bool) -> Tensor:
    """Queries that stand for real tokens, as far as mask and batch tell [batch queries]."""
    shape = seen.query.shape[0], seen.query.shape[2]
    labels = batch.get("labels")
    if "decoder" in path.split(".") and labels is not None and tuple(labels.shape) == shape and "input_ids" in batch:
        mask = seen.mask.padding
        if cross or mask is None:
            return labels != -100
    if not cross and seen.mask.padding is not None and seen.mask.queries == seen.mask.keys:
        return seen.mask.padding
    return torch.ones(shape, dtype=torch.bool, device=seen.query.device)


def fingerprint(model: nn.Module) -> str:
    """A short name for the weights of a model, without those that Sparsefinder learns."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "graftwork_attention" not in name and parameter.device.type != "meta":
            digest.update(parameter.detach().reshape(-1)[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def split_sentences(count: int, shares: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> tuple[range, range, range]:
    """Numbers of the sentences to train, tune and test on, in this order.

    Raises:
        DataError: If there are fewer than three sentences, one for each.
    """
    if count < 3:
        raise DataError(f"Found {count} sentences. Expected at least 3, one each to train, tune and test on.")
    tune, test = (max(1, int(count * share)) for share in shares[1:])
    return range(count - tune - test), range(count - tune - test, count - test), range(count - test, count)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
