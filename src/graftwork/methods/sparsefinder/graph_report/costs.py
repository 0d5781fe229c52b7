"""Measured time of one attention layer along a block graph, per executor, compared with SDPA and dense entmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.clustering import open_pairs
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.executors import gathered_attention, masked_attention
from graftwork.methods.sparsefinder.extraction import HeadBatch, QueriesKeys, pad_heads
from graftwork.methods.sparsefinder.flex import flex_attention
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.methods.sparsefinder.modules import SparsefinderAttention
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.metrics.cost import Candidate, compare_costs

KEPT = 0.125
"""Target share of key blocks in the predicted graph."""
BLOCK = 64
"""Tokens per block."""
DENSE_LIMIT = 2048
"""Maximal length of dense entmax; SDPA and blocks run at every length."""
SLOW_LIMIT = 1024
"""Maximal length of the executors that skip no work: masked, and uncompiled FlexAttention."""
ROUNDS = 3
"""Number of measured rounds."""

SDPA = "SDPA (softmax)"
DENSE = "dense entmax"


@dataclass(frozen=True)
class ExecutorCost:
    """Measured time and memory of one attention layer at one length."""

    label: str
    """Name of the executor."""
    length: int
    """Number of queries, equal to the number of keys."""
    backward: bool
    """True if the backward pass is included."""
    seconds: float
    """Median over the rounds."""
    time_ratio: float
    """Median over the rounds of the time divided by that of SDPA."""
    peak_bytes: int
    """Peak memory in bytes."""
    kept: float | None = None
    """Share of computed key blocks; null if all are computed."""
    device: str = "cpu"
    low: float | None = None
    """Shortest time over the rounds."""
    high: float | None = None
    """Longest time over the rounds."""
    rounds: int = 0
    """Number of rounds."""


def executor_costs(
    graft: SparsefinderAttention, train: QueriesKeys, held_out: QueriesKeys, site: int, lengths: Sequence[int]
) -> list[ExecutorCost]:
    """Measure one attention module on its queries and keys of held-out text, concatenated to each length.

    The graph of an encoder is predicted from block vectors (distance below a threshold calibrated on the training text,
    plus a band of three blocks). Decoders do not support block graphs and get a band.

    Args:
        graft: Attention module.
        train: Stored queries and keys for the calibration of thresholds.
        held_out: Stored queries and keys to measure on.
        site: Index of the module in both.
        lengths: Numbers of tokens.

    Raises:
        ConfigError: If the module is a cross-attention.
    """
    if graft.cross:
        raise ConfigError("Found a cross-attention. Expected a self-attention for the times of executors.")
    rows: list[ExecutorCost] = []
    with Progress("time of executors", total=len(lengths)) as progress:
        for length in lengths:
            rows += _at_length(graft, train, held_out, site, length)
            progress.advance(1)
    return rows


def _at_length(
    graft: SparsefinderAttention, train: QueriesKeys, held_out: QueriesKeys, site: int, length: int
) -> list[ExecutorCost]:
    data = _joined(held_out, site, length)
    scale, causal = data.site.scale, graft.causal
    repeats = data.query.shape[1] // data.key.shape[1]
    query, key = data.query, data.key.repeat_interleave(repeats, 1)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(length))
    q, k, v = leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    predict = _predictor(graft, train, site, data)
    graph = predict()
    allowed = graph.mask.block(0, length) if causal else None
    forwards: dict[str, Callable[[], Tensor]] = {
        SDPA: lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
    }
    if length <= DENSE_LIMIT:
        forwards[DENSE] = lambda: _dense_entmax(q, k, v, scale, allowed)
    if length <= SLOW_LIMIT:
        forwards["dense, masked"] = lambda: masked_attention(q, k, v, graph, scale=scale)
    forwards["blocks"] = lambda: gathered_attention(q, k, v, graph, scale=scale, size=BLOCK)
    forwards["blocks, prediction included"] = lambda: gathered_attention(q, k, v, predict(), scale=scale, size=BLOCK)
    if length <= SLOW_LIMIT:
        forwards["flex, not compiled"] = lambda: flex_attention(q, k, v, graph, scale=scale, alpha=1.5, size=BLOCK)
    kept = float(graph.coarse(BLOCK).float().mean())
    whole = {SDPA, DENSE, "dense, masked", "flex, not compiled"}
    rows: list[ExecutorCost] = []
    for backward in (False, True):
        candidates = {
            name: Candidate(forward, torch.ones_like(value), leaves)
            if backward
            else Candidate(torch.no_grad()(forward))
            for name, forward in forwards.items()
            if not (backward and name.startswith("flex"))
        }
        rows += [
            ExecutorCost(
                name,
                length,
                backward,
                cost.seconds,
                cost.time_ratio,
                cost.peak_bytes,
                None if name in whole else kept,
                low=cost.low,
                high=cost.high,
                rounds=ROUNDS,
            )
            for name, cost in compare_costs(candidates, SDPA, rounds=ROUNDS).items()
        ]
    return rows


def _joined(stored: QueriesKeys, site: int, length: int) -> HeadBatch:
    """Concatenate the queries and keys of consecutive sentences to one sequence, cyclically if there are too few."""
    parts: list[tuple[Tensor, Tensor]] = []
    found = 0
    for sentence in islice(cycle(range(len(stored))), length):
        parts.append(stored.read(sentence, site))
        found += parts[-1][0].shape[1]
        if found >= length:
            break
    query, key = (torch.cat([part[place] for part in parts], 1)[:, :length] for place in (0, 1))  # [heads length width]
    return pad_heads([(query, key)], stored.sites[site])


def _predictor(graft: SparsefinderAttention, train: QueriesKeys, site: int, data: HeadBatch) -> Callable[[], Graph]:
    """Calibrated predictor of the block graph."""
    clean = replace(
        graft.config, grouping=None, threshold=None, target_sparsity=None, add_cls_mask=False, add_last_mask=False
    )
    length = data.query.shape[2]
    mask = data.mask if graft.causal else replace(data.mask, padding=None)
    if graft.causal:
        band = replace(clean, grouping="window", window_size=max(3, round(KEPT * length)), block_size=1)
        return lambda: predict_graph(band, data.query, data.key, mask, Learned())
    config = replace(
        clean, grouping="distance", distance="l2", target_sparsity=1 - KEPT, window_size=3, block_size=BLOCK
    )
    with torch.no_grad():
        thresholds = open_pairs(config, graft, [_joined(train, site, length)]).thresholds(1 - KEPT)

    @torch.no_grad()
    def predict() -> Graph:
        query, key = graft.project(data.query, data.key)
        return predict_graph(config, query, key, mask, Learned(thresholds=thresholds))

    return predict


def _dense_entmax(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    scores = (query * scale) @ key.mT  # [batch heads queries keys]
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    # same solver as for gathered blocks
    return entmax(scores, solver="newton") @ value
