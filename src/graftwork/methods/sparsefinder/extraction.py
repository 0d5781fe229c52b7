"""Extraction of queries and keys on real text, recorded in the forward pass."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from graftwork.core.files import (
    drop_torn_line,
    read_json,
    read_lines,
    write_records,
)
from graftwork.core.progress import Progress
from graftwork.core.readers import fields_of
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.grafting.identity import matches_digest, weights_digest
from graftwork.methods.sparsefinder.modules import (
    AttentionCall,
    SparsefinderAttention,
    observe_calls,
    sparsefinder_modules,
)
from graftwork.methods.sparsefinder.stored import (
    INDEX_FILE,
    SENTENCES_FILE,
    HeadBatch,
    QueriesKeys,
    SiteData,
    pad_heads,
    write_index,
    write_shard,
)
from graftwork.methods.sparsefinder.tensors import numbers
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import pretrained
from graftwork.training.running_text import TextBatch

__all__ = ["HeadBatch", "QueriesKeys", "SiteData", "extract", "pad_heads", "record"]

logger = logging.getLogger(__name__)

EXTRACTION_SEED = 0
"""Seed of the masks of masked language models, together with the index of the chunk."""
_SHORT_FINGERPRINT = 16
"""Digits of the fingerprint of a model in extractions of earlier versions, which covered parts of the weights."""
BATCH = 8
"""Number of sentences per forward pass; each batch is one shard."""
IMPORTED = "legacy"
"""Entry of the identity of imported queries and keys: the name of their file."""


Collate = Callable[[Sequence[Any]], Mapping[str, Tensor]]
"""Collator of a batch of encoded examples."""


class Rows(Protocol):
    """Sized, indexable collection of encoded examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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
    sentences. Imported queries and keys are used as they are, all of them.

    Args:
        model: Converted model.
        dataset: Encoded examples.
        collate: Collator of a batch of examples.
        folder: Output folder of the index and of the shards, one per batch.
        samples: Maximal number of sentences.
        half_precision: Store float16.

    Raises:
        ConfigError: If the folder contains queries and keys of another model or text.
        CheckpointMismatchError: If imported ones have other layers, heads or widths than the model.
    """
    imported = _imported(folder, model)
    if imported is not None:
        return imported
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
    alphas = _alphas(model)
    if any(alpha != 1.5 for alpha in alphas):
        # α is no weight of the model, and decides the gold graphs
        identity["alpha"] = [list(alpha) if isinstance(alpha, tuple) else alpha for alpha in alphas]
    scales = module_scales(model)
    if any(scale is not None and not math.isclose(scale, width**-0.5) for scale, width in scales):
        # the scale is part of the configuration, not of the weights
        identity["scale"] = [scale for scale, _ in scales]
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


def _imported(folder: Path, model: nn.Module) -> QueriesKeys | None:
    """Queries and keys that `graftwork import sparsefinder --dump` stored; None if there are none.

    Raises:
        CheckpointMismatchError: If they have other layers, heads or widths than the model.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return None
    with fields_of(str(index), "identity, sites and sentences", error=CheckpointMismatchError):
        recorded = dict(read_json(index)["identity"])
    if IMPORTED not in recorded:
        return None
    stored = QueriesKeys(folder)
    grafts = list(sparsefinder_modules(model).values())
    query, _ = stored.read(0, 0)
    found = {(len(stored.sites), query.shape[0], query.shape[2])}
    expected = {(len(grafts), graft.heads, graft.width) for graft in grafts}
    if found != expected:
        raise CheckpointMismatchError(
            f"{folder} holds imported queries and keys of (layers, heads, width) {found}. Expected {expected} of the "
            "model. Import the dump of this model, or remove the folder to extract them."
        )
    logger.warning("Using the %d sentences imported from %s.", len(stored), recorded[IMPORTED])
    return stored


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
    # two processes of an earlier version appended the same sentences
    in_order = next((n for n, row in enumerate(done) if row.get("sentence", n) != n), len(done))
    whole = count if in_order >= count else in_order // BATCH * BATCH
    if whole < len(done):
        write_records(path, done[:whole])
    return done[:whole]


@torch.no_grad()
def record(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[list[tuple[Tensor, Tensor]]], list[SiteData]]:
    """Record the queries and keys of one batch, by sentence and module, without padding, on the CPU.

    Raises:
        ConfigError: If the model adds a position bias to its scores, which queries and keys do not contain.
    """
    grafts = sparsefinder_modules(model)
    paths = {id(graft): path for path, graft in grafts.items()}
    found: dict[str, tuple[SiteData, list[tuple[Tensor, Tensor]]]] = {}
    labelled = has_labelled_decoder(model)

    def observer(graft: SparsefinderAttention, call: AttentionCall) -> None:
        path = paths[id(graft)]
        if call.bias is not None:
            raise ConfigError(
                f"The scores of {path} have a position bias. Expected scores that are query·key alone. Choose a "
                "grouping by position, or none."
            )
        site = SiteData(
            path, graft.heads, plain_numbers(call.scale), graft.causal, graft.cross, plain_numbers(call.alpha)
        )
        queries = real_queries(path, call, batch, graft.cross, labelled=labelled)
        keys = call.mask.padding
        if keys is None and not graft.cross and call.query.shape[2] == call.key.shape[2]:
            # a decoder without a mask of its own: its padding follows from the labels
            keys = queries
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


def has_labelled_decoder(model: nn.Module) -> bool:
    """True if labels are the tokens of a decoder with an encoder, so that label −100 means padding."""
    return bool(getattr(pretrained(model).config, "is_encoder_decoder", False))


def real_queries(
    path: str, call: AttentionCall, batch: Mapping[str, Any], cross: bool, *, labelled: bool
) -> Bool[Tensor, "batch queries"]:
    """True for non-padding queries, as far as the mask and the labels of the batch determine them.

    Args:
        path: Path of the module.
        call: Arguments of its call.
        batch: Batch of the model.
        cross: True for cross-attention.
        labelled: Result of `has_labelled_decoder`; prompts of other decoders have label −100 too.
    """
    shape = call.query.shape[0], call.query.shape[2]
    labels = batch.get("labels")
    if (
        labelled
        and "decoder" in path.split(".")
        and labels is not None
        and tuple(labels.shape) == shape
        and "input_ids" in batch
    ):
        mask = call.mask.padding
        if cross or mask is None:
            return labels != -100
    if not cross and call.mask.padding is not None and call.mask.queries == call.mask.keys:
        return call.mask.padding
    return torch.ones(shape, dtype=torch.bool, device=call.query.device)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights of a model, without the weights of Sparsefinder."""
    return weights_digest(model, without=GRAFT)


def module_scales(model: nn.Module) -> list[tuple[float | None, int]]:
    """Factor on query·key that the attention module of every Sparsefinder module states, and the width of its heads.

    transformers names it `scaling` or `scale`; None if a module has neither.
    """
    found: list[tuple[float | None, int]] = []
    for path, graft in sparsefinder_modules(model).items():
        owner = model.get_submodule(path)
        stated = [getattr(owner, name, None) for name in ("scaling", "scale")]
        given = [float(value) for value in stated if isinstance(value, int | float)]
        found.append((given[0] if given else None, graft.width))
    return found


def _alphas(model: nn.Module) -> list[float | tuple[float, ...]]:
    """Current α of every Sparsefinder module."""
    return [plain_numbers(graft.current_alpha()) for graft in sparsefinder_modules(model).values()]


def plain_numbers(value: float | Tensor) -> float | tuple[float, ...]:
    """Plain number, or plain numbers of a tensor `value` [heads] or [heads 1 1]."""
    return tuple(numbers(value.detach().double().flatten())) if isinstance(value, Tensor) else float(value)


def _digest(value: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
