"""What a sample of data tells before training: how much rank each layer needs, and good matrices to start from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import attention_sites, pretrained

logger = logging.getLogger(__name__)

SAMPLE = 64
"""Examples of a sample, unless told otherwise."""
BATCH = 16
MULTIPLE = 8
"""Suggested ranks are rounded up to a multiple of this."""

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class LayerRank:
    """What one layer needs."""

    path: str
    rank: int
    """Smallest rank, rounded up, at which the error of the layer's attention output stays below the one asked for."""
    error: float
    """That error at this rank, relative to the output."""


def batches(
    dataset: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[Any]], Mapping[str, Tensor]], count: int = SAMPLE
) -> Iterator[Mapping[str, Tensor]]:
    """The first examples of a data set, collated."""
    rows = [dataset[index] for index in range(min(count, len(dataset)))]
    for start in range(0, len(rows), BATCH):
        yield {name: value for name, value in collate(rows[start : start + BATCH]).items() if name != "labels"}


@torch.no_grad()
def mean_attention(model: nn.Module, sample: Batches) -> dict[str, Tensor]:
    """The attention map of each layer [positions positions], averaged over rows and heads that reach a position.

    Args:
        model: A dense model; it computes its attention eagerly meanwhile, so that there is a map to look at.
        sample: Batches of inputs.

    Returns:
        Module path to map.
    """
    inner: Any = pretrained(model)
    before = inner.config._attn_implementation
    training = model.training
    model.eval()
    inner.set_attn_implementation("eager")
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    try:
        for batch in sample:
            inputs = {name: value.to(inner.device) for name, value in batch.items()}
            maps = inner(**inputs, output_attentions=True).attentions
            real = inputs["attention_mask"].bool()
            both = (real[:, :, None] & real[:, None, :]).float()
            sums = _added(sums, [(attention.float().mean(1) * both).sum(0) for attention in maps])
            counts = _added(counts, [both.sum(0)] * len(maps))
    finally:
        inner.set_attn_implementation(before)
        model.train(training)
    if not sums:
        raise ConfigError("Found no example to calibrate on. Give at least one.")
    paths = [site.path for site in attention_sites(model)]
    return {path: total / count.clamp_min(1) for path, total, count in zip(paths, sums, counts, strict=True)}


def initialize(student: nn.Module, dense: nn.Module, sample: Batches) -> None:
    """Start the student's matrices from the leading right singular vectors of the teacher's mean attention maps.

    Positions that no example of the sample reaches keep their Gaussian entries. The vectors are scaled to the variance
    that those entries have, so that the length rule fits both. With `share="layer"` the maps of all layers are
    averaged.
    """
    maps = mean_attention(dense, sample)
    grafts = {
        path: module._modules[GRAFT]
        for path, module in student.named_modules()
        if isinstance(module._modules.get(GRAFT), LinformerAttention)
    }
    mean = torch.stack([maps[path] for path in grafts]).mean(0)
    with torch.no_grad():
        for path, graft in grafts.items():
            matrices: Any = graft.matrices()  # type: ignore[union-attr]
            chosen = mean if graft.share == "layer" else maps[path]  # type: ignore[union-attr]
            for matrix in matrices:
                length, rank = min(len(chosen), matrix.shape[-2]), matrix.shape[-1]
                vectors = torch.linalg.svd(chosen[:length, :length]).Vh[:rank].T * length**0.5
                matrix[..., :length, : vectors.shape[1]] = vectors.to(matrix)


@torch.no_grad()
def suggest_ranks(model: nn.Module, sample: Sequence[Mapping[str, Tensor]], error: float = 0.05) -> list[LayerRank]:
    """The smallest rank of each layer at which the best compression keeps attention within an error.

    For every row and head of the sample the map A is replaced by its projection A·V·Vᵀ on the leading right singular
    vectors of the layer's own maps; the error is ‖A·V·Vᵀ − A‖ / ‖A‖ in the Frobenius norm, over the whole sample.
    Higher layers mostly need less.

    Args:
        model: A dense model.
        sample: Batches of inputs.
        error: Relative error allowed, between 0 and 1.

    Raises:
        ConfigError: If `error` is out of range or the sample is empty.
    """
    if not 0 < error < 1:
        raise ConfigError(f"error is {error}. Expected a number above 0 and below 1.")
    moments = _second_moments(model, sample)
    ranks = []
    for path, moment in moments.items():
        energy = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
        left = (1 - energy.cumsum(0) / energy.sum()).clamp_min(0).sqrt()
        needed = int((left > error).sum()) + 1
        rounded = min(-(-needed // MULTIPLE) * MULTIPLE, len(energy))
        ranks.append(LayerRank(path, rounded, float(left[rounded - 1])))
    return ranks


def automatic_rank(model: nn.Module, tokenizer: Any, rows: Sequence[Any], config: CaldConfig) -> int | tuple[int, ...]:
    """The rank that `rank="auto:…"` stands for: one number for each converted layer, or one for all if they share.

    No rank is larger than the 95th percentile of the lengths: that many slots hold almost every example whole.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        rows: Examples; the first `SAMPLE` count.
        config: Settings with such a rank.
    """
    from graftwork.training.encoding import PadBatch, padding_id

    limit = config.positions or int(pretrained(model).config.max_position_embeddings)
    encoded = [tokenizer(row.input, row.pair, truncation=True, max_length=limit) for row in rows[:SAMPLE]]
    sample = list(batches(encoded, PadBatch(padding_id(tokenizer))))
    lengths = sorted(len(each["input_ids"]) for each in encoded)
    longest = lengths[round(0.95 * (len(lengths) - 1))] if lengths else 0
    found = suggest_ranks(model, sample, (1 - (config.kept_share or 0)) ** 0.5)
    layers = parse_layers(config.layers, "layers")
    paths = [site.path for site in attention_sites(model) if layers is None or site.layer in layers]
    ranks = tuple(min(layer.rank, longest) for layer in found if layer.path in paths)
    if max(ranks, default=0) >= longest:
        logger.warning(
            "rank %s came out as %s, but 95 %% of the examples have at most %d tokens: nothing is gained where the "
            "rank is as large. Ask for less, or use longer inputs.",
            config.rank,
            list(ranks),
            longest,
        )
    return max(ranks) if config.share == "layer" else ranks


def _second_moments(model: nn.Module, sample: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Σ AᵀA over rows, heads and queries, for each layer: its eigenvectors are the best compression of all maps."""
    inner: Any = pretrained(model)
    before, training = inner.config._attn_implementation, model.training
    model.eval()
    inner.set_attn_implementation("eager")
    sums: list[Tensor] = []
    try:
        for batch in sample:
            inputs = {name: value.to(inner.device) for name, value in batch.items() if name != "labels"}
            real = inputs["attention_mask"].bool()
            maps = inner(**inputs, output_attentions=True).attentions
            flat = [(a.double() * real[:, None, :, None]).flatten(0, 2) for a in maps]
            sums = _added(sums, [rows.T @ rows for rows in flat])
    finally:
        inner.set_attn_implementation(before)
        model.train(training)
    if not sums:
        raise ConfigError("Found no example to calibrate on. Give at least one.")
    return dict(zip([site.path for site in attention_sites(model)], sums, strict=True))


def _added(sums: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Sums of square maps whose sizes differ from batch to batch."""
    if not sums:
        return new
    size = max(len(sums[0]), len(new[0]))
    grown = [nn.functional.pad(total, (0, size - len(total), 0, size - len(total))) for total in sums]
    return [
        total + nn.functional.pad(one, (0, size - len(one), 0, size - len(one)))
        for total, one in zip(grown, new, strict=True)
    ]
