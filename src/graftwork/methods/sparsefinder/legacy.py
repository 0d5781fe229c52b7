"""Files of the authors' code: dumps of queries and keys, projections and centroids, read without unpickling code."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import CheckpointMismatchError, ConfigError, DataError
from graftwork.methods.sparsefinder.extraction import (
    INDEX_FILE,
    SENTENCES_FILE,
    QueriesKeys,
    SiteData,
    _write_index,
    _write_shard,
)
from graftwork.methods.sparsefinder.modules import Projection, SparsefinderAttention

MOST_SENTENCES = 10_000
"""Sentences of a dump that the authors' readers use."""
SENTENCES_PER_SHARD = 8


def import_dump(
    path: Path,
    folder: Path,
    *,
    causal: bool = False,
    rescale_queries: bool = False,
    unscaled: bool | None = None,
    force: bool = False,
) -> QueriesKeys:
    """Turn `<name>_enc-attn.pt` into stored queries and keys.

    Source: section 2.6 of the specification; at most the first 10,000 sentences, as the authors' readers.

    Args:
        path: A dictionary with `q` and `k`, lists of [layers heads length width], and `length_src`, a list or tensor.
        folder: Where to write.
        causal: Whether the dump is of decoder self-attention.
        rescale_queries: Queries are divided by √width already (fairseq), so multiply them back.
        unscaled: What is known of the dump: True if its queries are as the model computed them.
        force: Rescale although the dump says that it is unscaled.

    Raises:
        ConfigError: If queries of a dump that is known to be unscaled are to be rescaled.
        DataError: If the file is no such dump; the message names the field.
    """
    content = _read(path)
    if not isinstance(content, Mapping) or not {"q", "k", "length_src"} <= content.keys():
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise DataError(f"{path}: found {found}. Expected a dictionary with q, k and length_src.")
    known = bool(content.get("unscaled", unscaled))
    if rescale_queries and known and not force:
        raise ConfigError(
            f"{path} says that its queries are unscaled, so rescale_queries would multiply them by √width once too "
            "often. Leave it off, or force it."
        )
    lengths = [int(length) for length in torch.as_tensor(content["length_src"]).flatten().tolist()]
    queries, keys = content["q"], content["k"]
    if not len(queries) == len(keys) == len(lengths):
        raise DataError(f"{path}: found {len(queries)} q, {len(keys)} k and {len(lengths)} lengths. Expected as many.")
    pairs = [_pair(path, number, queries[number], keys[number]) for number in range(min(len(lengths), MOST_SENTENCES))]
    if not pairs:
        raise DataError(f"{path} holds no sentence. Expected at least one.")
    layers, heads, _, width = pairs[0][0].shape
    factor = width**0.5 if rescale_queries else 1.0
    sites = [SiteData(f"layer.{layer}", heads, width**-0.5, causal, False) for layer in range(layers)]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_FILE, SENTENCES_FILE):
        (folder / name).unlink(missing_ok=True)
    for start in range(0, len(pairs), SENTENCES_PER_SHARD):
        part = [
            [(query[layer] * factor, key[layer]) for layer in range(layers)]
            for query, key in pairs[start : start + SENTENCES_PER_SHARD]
        ]
        _write_shard(folder, start, part, half=False)
    _write_index(folder / INDEX_FILE, {"legacy": path.name, "rescaled": rescale_queries}, sites, len(pairs))
    return QueriesKeys(folder)


def read_projections(path: Path, heads: int) -> list[tuple[Projection, Projection]]:
    """A list over layers of {"q": state, "k": state}, linear (w, b) or with one layer (w1, b1, w2, b2).

    Returns:
        Query and key projection of every layer; the same object twice where both states are equal.

    Raises:
        DataError: If the file holds anything else, or projections for another number of heads.
    """
    content = _read(path)
    if not isinstance(content, Sequence) or not all(isinstance(x, Mapping) and {"q", "k"} <= x.keys() for x in content):
        raise DataError(f"{path}: found no list of projections. Expected one dictionary with q and k for each layer.")
    layers = []
    for number, entry in enumerate(content):
        query = _projection(path, number, entry["q"], heads)
        shared = all(torch.equal(value, entry["k"].get(name, torch.empty(0))) for name, value in entry["q"].items())
        layers.append((query, query if shared else _projection(path, number, entry["k"], heads)))
    return layers


def read_centroids(path: Path) -> list[Tensor]:
    """A list over layers of centroids [heads runs clusters width], as float32.

    Raises:
        DataError: If the file holds anything else.
    """
    content = _read(path)
    if isinstance(content, Tensor):
        content = [content]
    if not isinstance(content, Sequence) or not all(isinstance(x, Tensor) and x.ndim == 4 for x in content):
        raise DataError(f"{path}: found no list of centroids. Expected tensors [heads runs clusters width].")
    return [tensor.float() for tensor in content]


def load_into(
    grafts: Sequence[SparsefinderAttention],
    projections: Sequence[tuple[Projection, Projection]],
    centroids: Sequence[Tensor] | None = None,
) -> None:
    """Put projections and centroids of old files into a converted model, and switch its graphs on.

    Raises:
        CheckpointMismatchError: If layers or shapes differ.
    """
    if len(grafts) != len(projections) or (centroids is not None and len(centroids) != len(grafts)):
        raise CheckpointMismatchError(
            f"Found files of {len(projections)} layers for a model of {len(grafts)} attention modules. Give "
            "files of the same model."
        )
    for number, (graft, (query, key)) in enumerate(zip(grafts, projections, strict=True)):
        pairs = [(graft.query_projection, query), (graft.key_projection, key)]
        for own, read in pairs:
            if own is not None:
                _copy(own, read, number)
        if centroids is not None:
            buffer = graft._buffers.get("centroids")
            if buffer is None or buffer.shape != centroids[number].shape:
                raise CheckpointMismatchError(
                    f"Found centroids {list(centroids[number].shape)} in layer {number} for a module with "
                    f"{None if buffer is None else list(buffer.shape)}. Set num_clusters, cluster_rounds and "
                    "rounds alike."
                )
            buffer.copy_(centroids[number])
        graft.active.fill_(True)


def _copy(own: Projection, read: Projection, layer: int) -> None:
    mine, theirs = own.state_dict(), read.state_dict()
    different = [name for name in mine if name not in theirs or mine[name].shape != theirs[name].shape]
    if different or len(mine) != len(theirs):
        raise CheckpointMismatchError(
            f"The projection of layer {layer} has other shapes than the model's. Set rounds, hidden_size and "
            "concat_q_and_k as they were."
        )
    own.load_state_dict(theirs)


def _pair(path: Path, number: int, query: Any, key: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.ndim != 4 or key.ndim != 4:
        raise DataError(f"{path}, sentence {number}: found no tensors [layers heads length width] in q and k.")
    return query.float(), key.float()


def _projection(path: Path, layer: int, state: Mapping[str, Tensor], heads: int) -> Projection:
    names = [("w", "b")] if {"w", "b"} <= state.keys() else [("w1", "b1"), ("w2", "b2")]
    if not all(name in state for pair in names for name in pair):
        raise DataError(f"{path}, layer {layer}: found {', '.join(state)}. Expected w and b, or w1, b1, w2 and b2.")
    if state[names[0][0]].shape[0] != heads:
        raise DataError(f"{path}, layer {layer}: found {state[names[0][0]].shape[0]} heads. Expected {heads}.")
    weights = [state[weight].float() for weight, _ in names]
    hidden = None if len(weights) == 1 else weights[0].shape[2]
    projection = Projection(heads, weights[0].shape[1], weights[-1].shape[2], hidden, seed=0)
    with torch.no_grad():
        for number, (weight, bias) in enumerate(names):
            nn.Module.get_parameter(projection, f"weights.{number}").copy_(state[weight])
            nn.Module.get_parameter(projection, f"biases.{number}").copy_(state[bias])
    return projection


def _read(path: Path) -> Any:
    """Tensors and plain containers out of a file; anything that would run code is refused."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the path of a file that the authors' scripts wrote.")
    try:
        with warnings.catch_warnings():
            # of pickle protocols, where the outcome says all
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path} cannot be read as tensors in plain containers ({first[:120]}). Pickled scikit-learn objects are "
            "refused, because reading them runs code. Where the file can be trusted, convert it with the authors' "
            "convert_kmeans_to_torch_centroids.py, or save torch tensors with torch.save."
        ) from None
