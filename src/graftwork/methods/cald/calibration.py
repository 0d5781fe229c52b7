"""Calibration on a sample of data before training: rank of each layer, and SVD initialisation of the matrices."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.surgery.attention import seam_modules
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.sites import attention_sites, pretrained
from graftwork.training.encoding import PadBatch, padding_id
from graftwork.training.running_text import positions_of
from graftwork.training.samples import SAMPLE, batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example

logger = logging.getLogger(__name__)

MULTIPLE = 8
"""Suggested ranks are rounded up to a multiple of this number."""

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class LayerRank:
    """Suggested rank of one layer."""

    path: str
    rank: int
    """Smallest rank, rounded up to a multiple of `MULTIPLE`, whose error is at most the requested one."""
    error: float
    """Relative error of the layer's attention maps at this rank."""


@torch.no_grad()
def mean_attention(model: nn.Module, sample: Batches) -> dict[str, Tensor]:
    """Compute the mean attention map of each layer, over all heads and all sequences that contain both positions.

    Args:
        model: Dense model; uses eager attention during the call, which returns attention maps.
        sample: Batches of inputs.

    Returns:
        Path of the attention module to map [positions positions].

    Raises:
        ConfigError: If the sample is empty.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for maps, real in _attention_maps(model, sample):
        both = (real[:, :, None] & real[:, None, :]).float()  # [batch, tokens, tokens]
        # [batch, heads, tokens, tokens] → mean over heads, sum over the batch: [tokens, tokens]
        sums = _added(sums, [(attention.float().mean(1) * both).sum(0) for attention in maps])
        counts = _added(counts, [both.sum(0)] * len(maps))
    if not sums:
        raise ConfigError("Found no example to calibrate on. Expected at least one. Add training examples.")
    paths = [site.path for site in attention_sites(model)]
    return {path: total / count.clamp_min(1) for path, total, count in zip(paths, sums, counts, strict=True)}


def initialize(student: nn.Module, dense: nn.Module, sample: Batches) -> None:
    """Initialise the student's matrices from the teacher's mean attention maps; see `set_singular_vectors`.

    Args:
        student: Converted model, changed in place.
        dense: Dense model with the same weights.
        sample: Batches of inputs.
    """
    set_singular_vectors(student, mean_attention(dense, sample))


def set_singular_vectors(student: nn.Module, maps: Mapping[str, Tensor]) -> None:
    """Set the student's matrices to the leading right singular vectors of mean attention maps.

    With the mean map Ā = U Σ Vᵀ of n positions, rows 1 … n of the matrix are √n · V[:, :rank]. The factor gives them
    the unit variance of Gaussian entries, with which rows beyond the longest example of the sample stay filled. With
    `share="layer"` the maps of all layers are averaged.

    Args:
        student: Converted model, changed in place.
        maps: Mean map [positions positions] of each attention module, by path; see `mean_attention`.
    """
    grafts = {path: graft for path, graft in seam_modules(student).items() if isinstance(graft, LinformerAttention)}
    mean = torch.stack([maps[path] for path in grafts]).mean(0)  # [layers, n, n] → [n, n]
    with torch.no_grad():
        for path, graft in grafts.items():
            chosen = mean if graft.share == "layer" else maps[path]
            for matrix in graft.matrices():  # [*heads, positions, rank]
                length, rank = min(len(chosen), matrix.shape[-2]), matrix.shape[-1]
                vectors = _right_singular_vectors(chosen[:length, :length])[:, :rank] * length**0.5  # [length, rank]
                matrix[..., :length, : vectors.shape[1]] = vectors.to(matrix)


@torch.no_grad()
def suggest_ranks(model: nn.Module, sample: Sequence[Mapping[str, Tensor]], error: float = 0.05) -> list[LayerRank]:
    """Compute the smallest rank of each layer at which the best compression has at most the given error.

    With the attention maps A of all sequences and heads of a layer, the best compression of rank r projects each on the
    leading r eigenvectors V of Σ AᵀA. Its relative error in the Frobenius norm over the whole sample is

        √(Σ ‖A V Vᵀ − A‖² / Σ ‖A‖²) = √(1 − Σ_{i≤r} λ_i / Σ_i λ_i)

    with the eigenvalues λ in descending order. Higher layers usually need a smaller rank.

    Args:
        model: Dense model.
        sample: Batches of inputs.
        error: Maximum relative error, between 0 and 1.

    Returns:
        Rank and error of each layer, in order.

    Raises:
        ConfigError: If `error` is out of range or the sample is empty.
    """
    if not 0 < error < 1:
        raise ConfigError(f"error is {error}. Expected a number above 0 and below 1.")
    moments = _second_moments(model, sample)
    ranks: list[LayerRank] = []
    for path, moment in moments.items():
        energy = _eigenvalues(moment).flip(0).clamp_min(0)  # [positions], descending
        left = (1 - energy.cumsum(0) / energy.sum()).clamp_min(0).sqrt()  # error of rank 1, 2, …
        needed = int((left > error).sum()) + 1
        rounded = min(-(-needed // MULTIPLE) * MULTIPLE, len(energy))
        ranks.append(LayerRank(path, rounded, float(left[rounded - 1])))
    return ranks


def automatic_rank(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], config: CaldConfig
) -> int | tuple[int, ...]:
    """Choose the rank for `rank="auto:…"`: one number per converted layer, or a single one if all share a matrix.

    Ranks are capped at the 95th percentile of the sequence lengths, because more slots than tokens save nothing.

    Args:
        model: Dense model.
        tokenizer: Its tokenizer.
        rows: Examples, of which the first `SAMPLE` are used.
        config: Settings with an automatic rank.
    """
    limit = min(config.positions or 1 << 30, positions_of(pretrained(model)))
    encoded: list[Mapping[str, list[int]]] = [
        cast(Any, tokenizer)(row.input, row.pair, truncation=True, max_length=limit) for row in rows[:SAMPLE]
    ]
    sample = list(batches(encoded, PadBatch(padding_id(tokenizer))))
    lengths = sorted(len(each["input_ids"]) for each in encoded)
    longest = lengths[round(0.95 * (len(lengths) - 1))] if lengths else 0
    found = suggest_ranks(model, sample, (1 - (config.kept_share or 0)) ** 0.5)
    layers = parse_layers(config.layers, "layers")
    paths = [site.path for site in attention_sites(model) if layers is None or site.layer in layers]
    ranks = tuple(min(layer.rank, longest) for layer in found if layer.path in paths)
    if max(ranks, default=0) >= longest:
        logger.warning(
            "rank %s was calibrated to %s, but 95 %% of the examples have at most %d tokens. Layers with a rank that "
            "large save nothing. Set a smaller share in rank, or use longer inputs.",
            config.rank,
            list(ranks),
            longest,
        )
    return max(ranks) if config.share == "layer" else ranks


def _second_moments(model: nn.Module, sample: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Σ AᵀA [positions positions] over sequences, heads and queries, by path of the attention module."""
    sums: list[Tensor] = []
    for maps, real in _attention_maps(model, sample):
        # rows of real queries: [batch, heads, tokens, tokens] → [batch·heads·tokens, tokens]
        flat = [(attention.double() * real[:, None, :, None]).flatten(0, 2) for attention in maps]
        sums = _added(sums, [rows.T @ rows for rows in flat])
    if not sums:
        raise ConfigError("Found no example to calibrate on. Expected at least one. Add training examples.")
    return dict(zip([site.path for site in attention_sites(model)], sums, strict=True))


def _attention_maps(model: nn.Module, sample: Batches) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Attention maps [batch heads tokens tokens] of each layer and mask of real tokens [batch tokens], per batch."""
    inner: Any = pretrained(model)
    before, training = inner.config._attn_implementation, model.training
    model.eval()
    inner.set_attn_implementation("eager")
    try:
        for batch in sample:
            inputs = {name: value.to(inner.device) for name, value in batch.items() if name != "labels"}
            yield inner(**inputs, output_attentions=True).attentions, inputs["attention_mask"].bool()
    finally:
        inner.set_attn_implementation(before)
        model.train(training)


def _right_singular_vectors(matrix: Tensor) -> Tensor:
    """Right singular vectors of a matrix [n n], as columns in descending order of their singular values."""
    linalg: Any = torch.linalg
    return linalg.svd(matrix).Vh.T


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues [n] of a symmetric matrix [n n], ascending."""
    linalg: Any = torch.linalg
    return linalg.eigvalsh(matrix)


def _added(sums: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Add square maps [tokens tokens] of batches of different lengths, zero-padded to the longest."""
    if not sums:
        return new
    size = max(len(sums[0]), len(new[0]))
    grown = [nn.functional.pad(total, (0, size - len(total), 0, size - len(total))) for total in sums]
    return [
        total + nn.functional.pad(one, (0, size - len(one), 0, size - len(one)))
        for total, one in zip(grown, new, strict=True)
    ]
