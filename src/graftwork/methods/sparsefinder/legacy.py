"""Readers for files of the authors' code: dumps, projections and centroids, without executing pickled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftwork.core.readers import fields_of, read_tensors
from graftwork.errors import CheckpointMismatchError, ConfigError, DataError
from graftwork.methods.sparsefinder.extraction import IMPORTED, plain_numbers
from graftwork.methods.sparsefinder.modules import Projection, SparsefinderAttention
from graftwork.methods.sparsefinder.stored import (
    INDEX_FILE,
    SENTENCES_FILE,
    QueriesKeys,
    SiteData,
    write_index,
    write_shard,
)
from graftwork.methods.sparsefinder.tensors import numbers

MOST_SENTENCES = 10_000
"""Maximal number of sentences of a dump, as in the authors' readers."""
SENTENCES_PER_SHARD = 8
"""Number of sentences per shard."""


def import_dump(
    path: Path,
    folder: Path,
    *,
    causal: bool = False,
    rescale_queries: bool = False,
    unscaled: bool | None = None,
    force: bool = False,
    grafts: Sequence[SparsefinderAttention] = (),
    scales: Sequence[float | None] = (),
) -> QueriesKeys:
    """Convert `<name>_enc-attn.pt` to stored queries and keys.

    Source: section 2.6 of the specification; at most the first 10,000 sentences, as in the authors' readers. Differs
    from them: positions from `length_src` on are padding and are removed.

    Args:
        path: File with a dictionary of `q` and `k`, lists of [layers heads length width], and `length_src`, a list or
            tensor.
        folder: Output folder.
        causal: True for a dump of decoder self-attention.
        rescale_queries: Multiply queries by √width; choose this for fairseq dumps, whose queries are divided by it.
        unscaled: True if the queries are known to be unscaled; a field of the dump takes precedence.
        force: Rescale even if the dump is marked as unscaled.
        grafts: Modules of the model that the dump belongs to, whose layers, heads, width and α it must have; none to
            accept any, with unknown α.
        scales: Factor on query·key of each module; None, and none at all, for width^-0.5.

    Raises:
        ConfigError: If `rescale_queries` is set for a dump that is marked as unscaled.
        DataError: If the file is not such a dump; the message names the field.
    """
    loaded = _read(path)
    content = _mapping(loaded)
    if not {"q", "k", "length_src"} <= content.keys():
        found = ", ".join(map(str, content)) or type(loaded).__name__
        raise DataError(f"{path}: found {found}. Expected a dictionary with q, k and length_src.")
    known = bool(content.get("unscaled", unscaled))
    if rescale_queries and known and not force:
        raise ConfigError(
            f"{path} is marked as unscaled. Expected queries divided by √width for rescale_queries. Switch it off, or "
            "set force."
        )
    where = f"{path}, length_src"
    with fields_of(where, "a list or tensor of whole numbers"):
        try:
            given = numbers(torch.as_tensor(content["length_src"]).flatten().double())
        except RuntimeError:
            raise TypeError("no tensor of numbers") from None
    queries, keys = _sequence(content["q"]), _sequence(content["k"])
    if not len(queries) == len(keys) == len(given):
        raise DataError(
            f"{path}: found {len(queries)} q, {len(keys)} k and {len(given)} lengths. Expected equal numbers."
        )
    count = min(len(given), MOST_SENTENCES)
    pairs = [_pair(path, number, queries[number], keys[number], given[number]) for number in range(count)]
    if not pairs:
        raise DataError(f"{path} contains no sentence. Expected at least one.")
    layers, heads, _, width = pairs[0][0].shape
    for number, pair in enumerate(pairs):
        for field, tensor in zip("qk", pair, strict=True):
            if (*tensor.shape[:2], tensor.shape[3]) != (layers, heads, width):
                raise DataError(
                    f"{path}, sentence {number}, {field}: found {list(tensor.shape)}. Expected [{layers} {heads} "
                    f"length {width}], as q of the first sentence."
                )
    _check_model(path, (layers, heads, width), grafts)
    factor = width**0.5 if rescale_queries else 1.0
    alphas = [plain_numbers(graft.current_alpha()) for graft in grafts] or [None] * layers
    usual = width**-0.5
    factors = [usual if scale is None else scale for scale in scales] or [usual] * layers
    sites = [
        SiteData(f"layer.{layer}", heads, scale, causal, False, alpha)
        for layer, (scale, alpha) in enumerate(zip(factors, alphas, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (INDEX_FILE, SENTENCES_FILE):
        (folder / name).unlink(missing_ok=True)
    for start in range(0, len(pairs), SENTENCES_PER_SHARD):
        part = [
            [(query[layer] * factor, key[layer]) for layer in range(layers)]
            for query, key in pairs[start : start + SENTENCES_PER_SHARD]
        ]
        write_shard(folder, start, part, half=False)
    write_index(folder / INDEX_FILE, {IMPORTED: path.name, "rescaled": rescale_queries}, sites, len(pairs))
    return QueriesKeys(folder)


def read_projections(path: Path, heads: int) -> list[tuple[Projection, Projection]]:
    """Read a list over layers of {"q": state, "k": state}, linear (w, b) or with one tanh layer (w1, b1, w2, b2).

    Returns:
        Query and key projection of every layer; the same object twice if both states are equal.

    Raises:
        DataError: If the file contains anything else, or projections for another number of heads.
    """
    content = [_mapping(entry) for entry in _sequence(_read(path))]
    if not content or not all(_is_state(entry.get(name)) for entry in content for name in ("q", "k")):
        raise DataError(f"{path}: found no list of projections. Expected one dictionary with q and k for each layer.")
    layers: list[tuple[Projection, Projection]] = []
    for number, entry in enumerate(content):
        query = _projection(path, number, entry["q"], heads)
        shared = all(torch.equal(value, entry["k"].get(name, torch.empty(0))) for name, value in entry["q"].items())
        layers.append((query, query if shared else _projection(path, number, entry["k"], heads)))
    return layers


def read_centroids(path: Path) -> list[Tensor]:
    """Read a list over layers of centroids [heads runs clusters width] as float32.

    Raises:
        DataError: If the file contains anything else.
    """
    content = _read(path)
    layers = [content] if isinstance(content, Tensor) else _sequence(content)
    tensors = [layer for layer in layers if isinstance(layer, Tensor) and layer.ndim == 4 and layer.is_floating_point()]
    if not tensors or len(tensors) != len(layers):
        raise DataError(f"{path}: found no list of centroids. Expected tensors [heads runs clusters width].")
    return [tensor.float() for tensor in tensors]


def load_into(
    grafts: Sequence[SparsefinderAttention],
    projections: Sequence[tuple[Projection, Projection]],
    centroids: Sequence[Tensor] | None = None,
) -> None:
    """Copy projections and centroids into a converted model and activate its graphs.

    Raises:
        CheckpointMismatchError: If layers or shapes differ.
    """
    if len(grafts) != len(projections) or (centroids is not None and len(centroids) != len(grafts)):
        raise CheckpointMismatchError(
            f"Found files of {len(projections)} layers. Expected {len(grafts)}, the number of attention modules of the "
            "model. Choose files of the same model."
        )
    for number, (graft, (query, key)) in enumerate(zip(grafts, projections, strict=True)):
        pairs = [(graft.query_projection, query), (graft.key_projection, key)]
        for own, read in pairs:
            if own is not None:
                _copy(own, read, number)
        if centroids is not None:
            buffer = graft.centroids
            if buffer is None or buffer.shape != centroids[number].shape:
                raise CheckpointMismatchError(
                    f"Found centroids {list(centroids[number].shape)} in layer {number}. Expected "
                    f"{None if buffer is None else list(buffer.shape)}. Set num_clusters, cluster_rounds and rounds to "
                    "the values of the file."
                )
            buffer.copy_(centroids[number])
        graft.active.fill_(True)


def _copy(own: Projection, read: Projection, layer: int) -> None:
    mine, theirs = own.state_dict(), read.state_dict()
    different = [name for name in mine if name not in theirs or mine[name].shape != theirs[name].shape]
    if different or len(mine) != len(theirs):
        raise CheckpointMismatchError(
            f"Found other shapes in the projections of layer {layer}. Expected the shapes of the model. Set rounds, "
            "hidden_size and concat_q_and_k to the values of the file."
        )
    own.load_state_dict(theirs)


def _pair(path: Path, number: int, query: object, key: object, given: float) -> tuple[Tensor, Tensor]:
    """Query and key [layers heads length width] of one sentence without padding, in float32."""
    found: list[Tensor] = []
    for field, value in (("q", query), ("k", key)):
        where = f"{path}, sentence {number}, {field}"
        if not (isinstance(value, Tensor) and value.ndim == 4 and value.numel() and value.is_floating_point()):
            shape = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"{where}: found {shape}. Expected a real tensor [layers heads length width].")
        found.append(value.float())
    padded = min(tensor.shape[2] for tensor in found)
    if found[0].shape[2] != found[1].shape[2]:
        raise DataError(
            f"{path}, sentence {number}: found {found[0].shape[2]} positions in q and {found[1].shape[2]} in k. "
            "Expected equal numbers: only dumps of self-attention are imported."
        )
    if not (given.is_integer() and 1 <= given <= padded):
        raise DataError(
            f"{path}, sentence {number}, length_src: found {given:g} for {padded} positions in q and k. Expected a "
            f"whole number from 1 to {padded}."
        )
    cut = [tensor[:, :, : int(given)] for tensor in found]
    for field, tensor in zip("qk", cut, strict=True):
        if not tensor.isfinite().all():
            raise DataError(
                f"{path}, sentence {number}, {field}: found NaN or infinite values. Expected finite numbers. Repeat "
                "the extraction with a model in float32."
            )
    return cut[0], cut[1]


def _check_model(path: Path, shape: tuple[int, int, int], grafts: Sequence[SparsefinderAttention]) -> None:
    """Check that a dump of `shape` (layers, heads, width) has the shape of the model's modules."""
    expected = {(len(grafts), graft.heads, graft.width) for graft in grafts}
    if expected and expected != {shape}:
        raise DataError(
            f"{path}: found {shape[0]} layers with {shape[1]} heads of width {shape[2]}. Expected the shape of the "
            f"model, {' or '.join(f'{a} layers with {b} heads of width {c}' for a, b, c in sorted(expected))}. Choose "
            "the dump of this model."
        )


def _projection(path: Path, layer: int, state: Mapping[str, Tensor], heads: int) -> Projection:
    names = [("w", "b")] if {"w", "b"} <= state.keys() else [("w1", "b1"), ("w2", "b2")]
    if not all(name in state for pair in names for name in pair):
        raise DataError(f"{path}, layer {layer}: found {', '.join(state)}. Expected w and b, or w1, b1, w2 and b2.")
    shapes = [list(state[name].shape) for pair in names for name in pair]
    if any(len(shape) != 3 or 0 in shape or shape[0] != shapes[0][0] for shape in shapes[::2]):
        raise DataError(f"{path}, layer {layer}: found shapes {shapes}. Expected weights [heads inputs outputs].")
    if state[names[0][0]].shape[0] != heads:
        raise DataError(f"{path}, layer {layer}: found {state[names[0][0]].shape[0]} heads. Expected {heads}.")
    for name in (name for pair in names for name in pair):
        if not state[name].isfinite().all():
            raise DataError(f"{path}, layer {layer}, {name}: found NaN or infinite values. Expected finite numbers.")
    weights = [state[weight].float() for weight, _ in names]
    hidden = None if len(weights) == 1 else weights[0].shape[2]
    projection = Projection(heads, weights[0].shape[1], weights[-1].shape[2], hidden, seed=0)
    with torch.no_grad():
        for number, pair in enumerate(names):
            for kind, name in zip(("weights", "biases"), pair, strict=True):
                parameter = nn.Module.get_parameter(projection, f"{kind}.{number}")
                if parameter.shape != state[name].shape:
                    raise DataError(
                        f"{path}, layer {layer}: found {name} of shape {list(state[name].shape)}. Expected "
                        f"{list(parameter.shape)}."
                    )
                parameter.copy_(state[name])
    return projection


def _is_state(value: object) -> bool:
    """True for a dictionary of real tensors by name."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
        for name, tensor in cast("Mapping[Any, Any]", value).items()
    )


def _mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, otherwise an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[object]:
    """The value if it is a sequence, otherwise an empty one."""
    return cast("Sequence[object]", value) if isinstance(value, Sequence) else ()


def _read(path: Path) -> object:
    """Load tensors and plain containers from a file; pickled code is refused."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected the path of a file written by the authors' scripts.")
    return read_tensors(
        path,
        advice="If the file is trusted, convert it with the authors' convert_kmeans_to_torch_centroids.py, or save "
        "torch tensors with torch.save.",
    )
